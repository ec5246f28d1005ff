// All of the standard library that the kernels see. A unit under isa/ includes it before it sets
// its target, so that no inline function of the library is compiled for a machine that may not be
// this one.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "candidates.h"
#include "instruction_sets.h"
#include "merge_tree.h"
#include "../operands.h"
#include "shown_items.h"
#include "workers.h"
