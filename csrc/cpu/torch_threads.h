// The entry point of the OpenMP runtime that torch has loaded, found at run time: this library does
// not link to OpenMP, since a second runtime would bring a second thread pool.
#pragma once

namespace offtower::cpu {

// GNU OpenMP's own: work(data) on `threads` threads, the calling one among them; flags are 0.
using ParallelCall = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Null where torch brings no GNU OpenMP, and in forked children: the threads of the parent's pool do
// not exist there, and a call would wait for them forever.
ParallelCall torch_parallel();

} // namespace offtower::cpu
