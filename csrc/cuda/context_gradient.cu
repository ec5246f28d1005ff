// du: contexts stay, items stream.
#include "backward.h"

namespace offtower::cuda {

void context_gradient(const BackwardOperands& in, const BackwardResults& results,
                      const PrepareProblem& prepared, Workspace& workspace, const Call& call) {
  run_gradient<false>(in, results, prepared, workspace, call);
}

} // namespace offtower::cuda
