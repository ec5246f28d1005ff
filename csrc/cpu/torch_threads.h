// The entry of the OpenMP runtime that torch has loaded, found at run time: this library links to
// no OpenMP, since a second runtime would bring a second pool.
#pragma once

namespace offtower::cpu {

// GNU OpenMP's own: work(data) on `threads` threads, the calling one among them; flags are 0.
using ParallelCall = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Null where torch brings no GNU OpenMP, and in the children of a fork: the threads of the parent's
// pool do not exist there, and waiting for them would never end.
ParallelCall torch_parallel();

} // namespace offtower::cpu
