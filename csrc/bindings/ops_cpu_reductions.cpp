// Private CPU operators of the reductions family (namespace attnforge_native): see ops_cpu.cpp.
#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

// [B, S, Hq, D] and [B, S, Hk, D], with the LSE [B, Hq, Sq] if the statistic is of probabilities.
ScoreParams scores_of(const Tensor& q, const Tensor& k, const OptionalTensor& lse,
                      const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                      const Scores& scores) {
  STD_TORCH_CHECK(q.dim() == 4, "attnforge_native: reductions want [B, S, H, D]");
  ScoreParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, k, std::nullopt, std::nullopt, seqused_k, alibi_slopes, std::nullopt, q.size(1),
              k.size(1), scores);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype);
  if (lse) {
    STD_TORCH_CHECK(lse->dim() == 3 && lse->size(0) == p.batch && lse->size(1) == p.heads_q &&
                        lse->size(2) == p.seqlen_q,
                    "attnforge_native: lse must be [batch, heads, rows]");
    params.lse = stat(*lse);
  }
  return params;
}

template <class T>
T* output(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel,
                  "attnforge_native: an output has the wrong dtype, layout or size");
  return static_cast<T*>(t.mutable_data_ptr());
}

int64_t rows_of(const ScoreParams& scores) {
  const FlashProblem& p = scores.problem;
  return p.batch * p.heads_q * p.seqlen_q;
}

template <class Params>
void run(Params& params, int64_t (*bytes)(const Params&, int64_t),
         void (*kernel)(const Params&, const Workers&)) {
  if (empty(params.scores.problem)) return;
  const Workers threads = workers();
  Tensor scratch = workspace(bytes(params, threads.num_threads));
  params.scores.workspace = scratch.mutable_data_ptr();
  kernel(params, threads);
}

void column_sums(const Tensor& q, const Tensor& k, const Tensor& lse,
                 const OptionalTensor& row_weights, const OptionalTensor& seqused_k,
                 const OptionalTensor& alibi_slopes, const Tensor& out, double softmax_scale,
                 int64_t window_left, int64_t window_right, double softcap) {
  ColumnSumsParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  const FlashProblem& p = params.scores.problem;
  if (row_weights) {
    STD_TORCH_CHECK(row_weights->dim() == 3 && row_weights->numel() == rows_of(params.scores),
                    "attnforge_native: row_weights must be [batch, heads, rows]");
    params.row_weights = stat(*row_weights);
  }
  params.out = output<float>(out, ScalarType::Float, p.batch * p.heads_q * p.seqlen_k);
  run(params, kernels().column_sums_workspace, kernels().column_sums);
}

void span_mass(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& boundaries,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const Tensor& out, double softmax_scale, int64_t window_left, int64_t window_right,
               double softcap) {
  SpanMassParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  params.boundaries = data<int32_t>(boundaries, ScalarType::Int);
  params.spans = boundaries.numel() - 1;
  params.out = output<float>(out, ScalarType::Float, rows_of(params.scores) * params.spans);
  run(params, kernels().span_mass_workspace, kernels().span_mass);
}

void span_grad(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& lse,
               const Tensor& boundaries, const OptionalTensor& seqused_k,
               const OptionalTensor& alibi_slopes, const Tensor& dq, const Tensor& dk,
               const Tensor& dlse, double softmax_scale, int64_t window_left, int64_t window_right,
               double softcap) {
  SpanGradParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  const DType dtype = params.scores.problem.dtype;
  params.boundaries = data<int32_t>(boundaries, ScalarType::Int);
  params.spans = boundaries.numel() - 1;
  params.dout = output<float>(dout, ScalarType::Float, rows_of(params.scores) * params.spans);
  params.dq = ref(dq, dtype), params.dk = ref(dk, dtype);
  params.dlse = output<float>(dlse, ScalarType::Float, rows_of(params.scores));
  run(params, kernels().span_grad_workspace, kernels().span_grad);
}

void block_max(const Tensor& q, const Tensor& k, const OptionalTensor& lse, int64_t q_block,
               int64_t k_block, const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const Tensor& out, double softmax_scale, int64_t window_left, int64_t window_right,
               double softcap) {
  BlockMaxParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  const FlashProblem& p = params.scores.problem;
  STD_TORCH_CHECK(q_block > 0 && k_block > 0, "attnforge_native: blocks must not be empty");
  params.q_block = q_block, params.k_block = k_block;
  auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  params.out = output<float>(
      out, ScalarType::Float,
      p.batch * p.heads_q * blocks(p.seqlen_q, q_block) * blocks(p.seqlen_k, k_block));
  run(params, kernels().block_max_workspace, kernels().block_max);
}

void row_entropy(const Tensor& q, const Tensor& k, const Tensor& lse,
                 const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                 const Tensor& out, double softmax_scale, int64_t window_left, int64_t window_right,
                 double softcap) {
  RowEntropyParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  params.out = output<float>(out, ScalarType::Float, rows_of(params.scores));
  run(params, kernels().row_entropy_workspace, kernels().row_entropy);
}

void topk_keys(const Tensor& q, const Tensor& k, const OptionalTensor& lse, int64_t n,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const Tensor& values, const Tensor& indices, double softmax_scale,
               int64_t window_left, int64_t window_right, double softcap) {
  TopKParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  STD_TORCH_CHECK(n > 0, "attnforge_native: topk_keys wants at least one key");
  params.n = n;
  params.values = output<float>(values, ScalarType::Float, rows_of(params.scores) * n);
  params.indices = output<int32_t>(indices, ScalarType::Int, rows_of(params.scores) * n);
  run(params, kernels().topk_keys_workspace, kernels().topk_keys);
}

// The caller has filled index, prob and count with what stands where there is no edge.
void edges(const Tensor& q, const Tensor& k, const Tensor& lse, double threshold,
           const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes, const Tensor& index,
           const Tensor& prob, const Tensor& count, double softmax_scale, int64_t window_left,
           int64_t window_right, double softcap) {
  EdgesParams params;
  params.scores = scores_of(q, k, lse, seqused_k, alibi_slopes,
                            {softmax_scale, window_left, window_right, softcap});
  STD_TORCH_CHECK(threshold >= 0.0, "attnforge_native: the threshold must not be negative");
  params.threshold = static_cast<float>(threshold);
  params.max_edges = prob.numel();
  params.index = output<int32_t>(index, ScalarType::Int, 4 * params.max_edges);
  params.prob = output<float>(prob, ScalarType::Float, params.max_edges);
  params.count = output<int64_t>(count, ScalarType::Long, 1);
  run(params, kernels().edges_workspace, kernels().edges);
}

void head_gradient(const Tensor& dout, const Tensor& out, const Tensor& rows, const Tensor& sums) {
  STD_TORCH_CHECK(dout.dim() == 4 && out.dim() == 4, "attnforge_native: want [B, S, H, D]");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(dout.size(d) == out.size(d), "attnforge_native: dout and out differ in shape");
  }
  HeadGradientParams params;
  params.dtype = dtype_of(out);
  params.batch = out.size(0);
  params.seqlen = out.size(1);
  params.heads = out.size(2);
  params.dim = out.size(3);
  params.dout = ref(dout, params.dtype), params.out = ref(out, params.dtype);
  const int64_t heads = params.batch * params.heads;
  params.rows = output<float>(rows, ScalarType::Float, heads * params.seqlen);
  params.sums = output<float>(sums, ScalarType::Float, heads);
  kernels().head_gradient(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_TAIL "Tensor? seqused_k, Tensor? alibi_slopes, "
#define ATTNFORGE_SCORES "float softmax_scale, int window_left, int window_right, float softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("column_sums(Tensor q, Tensor k, Tensor lse, Tensor? row_weights, " ATTNFORGE_TAIL
        "Tensor(a!) out, " ATTNFORGE_SCORES ") -> ()");
  m.def("span_mass(Tensor q, Tensor k, Tensor lse, Tensor boundaries, " ATTNFORGE_TAIL
        "Tensor(a!) out, " ATTNFORGE_SCORES ") -> ()");
  m.def("span_grad(Tensor dout, Tensor q, Tensor k, Tensor lse, Tensor boundaries, " ATTNFORGE_TAIL
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dlse, " ATTNFORGE_SCORES ") -> ()");
  m.def("block_max(Tensor q, Tensor k, Tensor? lse, int q_block, int k_block, " ATTNFORGE_TAIL
        "Tensor(a!) out, " ATTNFORGE_SCORES ") -> ()");
  m.def("row_entropy(Tensor q, Tensor k, Tensor lse, " ATTNFORGE_TAIL
        "Tensor(a!) out, " ATTNFORGE_SCORES ") -> ()");
  m.def("topk_keys(Tensor q, Tensor k, Tensor? lse, int n, " ATTNFORGE_TAIL
        "Tensor(a!) values, Tensor(b!) indices, " ATTNFORGE_SCORES ") -> ()");
  m.def("edges(Tensor q, Tensor k, Tensor lse, float threshold, " ATTNFORGE_TAIL
        "Tensor(a!) index, Tensor(b!) prob, Tensor(c!) count, " ATTNFORGE_SCORES ") -> ()");
  m.def("head_gradient(Tensor dout, Tensor out, Tensor(a!) rows, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("column_sums", TORCH_BOX(&attnforge::cpu::column_sums));
  m.impl("span_mass", TORCH_BOX(&attnforge::cpu::span_mass));
  m.impl("span_grad", TORCH_BOX(&attnforge::cpu::span_grad));
  m.impl("block_max", TORCH_BOX(&attnforge::cpu::block_max));
  m.impl("row_entropy", TORCH_BOX(&attnforge::cpu::row_entropy));
  m.impl("topk_keys", TORCH_BOX(&attnforge::cpu::topk_keys));
  m.impl("edges", TORCH_BOX(&attnforge::cpu::edges));
  m.impl("head_gradient", TORCH_BOX(&attnforge::cpu::head_gradient));
}
