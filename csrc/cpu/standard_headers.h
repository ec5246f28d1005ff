// All headers of the standard library that the kernels use. A unit under isa/ includes them before it
// sets its target, so that no inline function of the library is compiled for an instruction set that
// this machine may lack.
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

#include "distinct.h"
#include "top_k_buffer.h"
#include "instruction_sets.h"
#include "merge_tree.h"
#include "../operands.h"
#include "rows_by_action.h"
#include "workers.h"
