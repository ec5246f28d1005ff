// dv and db: items resident, contexts streamed.
#include "gradient_launch.h"

namespace offtower::cuda {

void item_gradient(const BackwardOperands& in, const BackwardResults& results,
                   const BackwardPreprocessParams& prepared, Workspace& workspace,
                   const Call& call) {
  run_gradient<true>(in, results, prepared, workspace, call);
}

int64_t backward(const BackwardOperands& in, const BackwardResults& results, const Call& call) {
  Workspace workspace(call.workspace);
  const int64_t padded_contexts = ceil_div(in.policy.rows, kContextPadding) * kContextPadding;
  float* const stats = workspace.allocate<float>(kRowStats * padded_contexts);
  const BackwardPreprocessParams prepare{in, stats, padded_contexts};
  if (call.workspace != nullptr)
    launch_elementwise<BackwardPreprocess>(prepare, padded_contexts, call);
  if (results.context != nullptr) context_gradient(in, results, prepare, workspace, call);
  if (results.item != nullptr || results.item_bias != nullptr)
    item_gradient(in, results, prepare, workspace, call);
  return workspace.bytes();
}

} // namespace offtower::cuda
