// du: contexts resident, items streamed.
#include "gradient_launch.h"

namespace offtower::cuda {

void context_gradient(const BackwardOperands& in, const BackwardResults& results,
                      const BackwardPreprocessParams& prepared, Workspace& workspace,
                      const Call& call) {
  run_gradient<false>(in, results, prepared, workspace, call);
}

} // namespace offtower::cuda
