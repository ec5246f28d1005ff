// dv and db: items stay, contexts stream.
#include "backward.h"

namespace offtower::cuda {

void item_gradient(const BackwardOperands& in, const BackwardResults& results,
                   const PrepareProblem& prepared, Workspace& workspace, const Call& call) {
  run_gradient<true>(in, results, prepared, workspace, call);
}

int64_t backward(const BackwardOperands& in, const BackwardResults& results, const Call& call) {
  Workspace workspace(call.workspace);
  PrepareProblem prepare{in, nullptr, ceil_div(in.policy.rows, 128) * 128};
  prepare.stats = workspace.take<float>(kRowStats * prepare.padded_contexts);
  if (call.workspace != nullptr) launch_small<Prepare>(prepare, prepare.padded_contexts, call);
  if (results.context != nullptr) context_gradient(in, results, prepare, workspace, call);
  if (results.item != nullptr || results.item_bias != nullptr)
    item_gradient(in, results, prepare, workspace, call);
  return workspace.bytes();
}

} // namespace offtower::cuda
