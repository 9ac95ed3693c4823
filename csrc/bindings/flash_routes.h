// Which kernels a forward of flash attention runs; for every binding that has one.
#pragma once

#include "cpu/kernels.h"

namespace attnforge::cpu {

// Calls run(size of the workspace, kernel) for each of them, after setting the route.
// The route is chosen per sequence, so that a request's result does not depend on its neighbours.
template <class Run>
void run_flash_routes(FlashFwdParams& params, const Run& run) {
  const FlashProblem& p = params.problem;
  const bool many = p.seqlen_q * (p.heads_q / p.heads_k) > kFewRows;
  if (many) {
    params.route = RowRoute::kManyRows;
    run(kernels().flash_fwd_workspace, kernels().flash_fwd);
  }
  if (!many || p.cu_seqlens_q) {
    params.route = RowRoute::kFewRows;
    run(kernels().flash_decode_workspace, kernels().flash_decode);
  }
}

}  // namespace attnforge::cpu
