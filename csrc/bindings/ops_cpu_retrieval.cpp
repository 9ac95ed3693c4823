// Private CPU operators of the retrieval family (namespace attnforge_native): see ops_cpu.cpp.
#include "bindings/lsh.h"

namespace attnforge::cpu {
namespace {

void indexed_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ids,
                 const OptionalTensor& lens, const OptionalTensor& log_bias,
                 const OptionalTensor& table, const OptionalTensor& used, double softmax_scale,
                 const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo) {
  IndexedFwdParams params = indexed_fwd_params(q, k, v, ids, lens, log_bias, table, used,
                                               softmax_scale, out, lse, out_lo, true);
  if (params.flash.out.data == nullptr) return;  // no rows
  Tensor scratch = workspace(kernels().indexed_fwd_workspace(params, workers().num_threads));
  params.flash.workspace = scratch.mutable_data_ptr();
  kernels().indexed_fwd(params, workers());
}

// The caller has zeroed dlog_bias.
void indexed_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                 const Tensor& v, const Tensor& out, const Tensor& lse,
                 const OptionalTensor& out_lo, const Tensor& ids, const OptionalTensor& lens,
                 const OptionalTensor& log_bias, const OptionalTensor& used, double softmax_scale,
                 const Tensor& dq, const Tensor& dk, const Tensor& dv,
                 const OptionalTensor& dlog_bias) {
  IndexedBwdParams params =
      indexed_bwd_params(dout, dlse, q, k, v, out, lse, out_lo, ids, lens, log_bias, used,
                         softmax_scale, dq, dk, dv, dlog_bias);
  if (empty(params.flash.problem)) return;
  Tensor scratch = workspace(kernels().indexed_bwd_workspace(params, workers().num_threads));
  params.flash.workspace = scratch.mutable_data_ptr();
  kernels().indexed_bwd(params, workers());
}

// ---- scores and selection ----

void key_scores(const Tensor& q, const Tensor& k, const OptionalTensor& table,
                const OptionalTensor& used, const OptionalTensor& counts, double softmax_scale,
                const Tensor& out) {
  const KeyScoresParams params = key_scores_params(q, k, table, used, counts, softmax_scale, out);
  if (!empty(params.problem) && out.numel() > 0) kernels().key_scores(params, workers());
}

void page_scores(const Tensor& q, const Tensor& low, const Tensor& high,
                 const OptionalTensor& scale, const OptionalTensor& table,
                 const OptionalTensor& used, double softmax_scale, bool grouped,
                 const Tensor& out) {
  PageScoresParams params =
      page_scores_params(q, low, high, scale, table, used, softmax_scale, grouped, out);
  if (out.numel() == 0) return;
  Tensor scratch = workspace(kernels().page_scores_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().page_scores(params, workers());
}

void select_columns(const Tensor& scores, const OptionalTensor& used, int64_t kind, int64_t k,
                    const OptionalTensor& threshold, double mass, int64_t first, int64_t last,
                    const Tensor& ids, const Tensor& lens) {
  kernels().select_columns(
      select_params(scores, used, kind, k, threshold, mass, first, last, ids, lens), workers());
}

// columns [rows, most]; starts [lists, runs + 1], each for rows / lists of them.
void expand_runs(const Tensor& columns, const OptionalTensor& lens, const Tensor& starts,
                 int64_t tail_begin, int64_t tail_end, const Tensor& ids, const Tensor& sizes) {
  ExpandRunsParams params;
  STD_TORCH_CHECK(columns.dim() == 2 && columns.is_contiguous() &&
                      columns.scalar_type() == ScalarType::Int && starts.dim() == 2 &&
                      starts.is_contiguous() && starts.scalar_type() == ScalarType::Int &&
                      starts.size(0) > 0 && columns.size(0) % starts.size(0) == 0 && ids.dim() == 2,
                  "attnforge_native: columns and starts must be contiguous int32 rows");
  params.columns = static_cast<const int32_t*>(columns.const_data_ptr());
  params.rows = columns.size(0), params.most = columns.size(1);
  STD_TORCH_CHECK(!lens || lens->numel() == params.rows, "attnforge_native: lens: one per row");
  params.lens = data<int32_t>(lens, ScalarType::Int);
  params.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  params.runs = starts.size(1) - 1, params.share = params.rows / starts.size(0);
  params.tail_begin = tail_begin, params.tail_end = tail_end;
  params.slots = ids.size(1);
  params.ids = output<int32_t>(ids, ScalarType::Int, params.rows * params.slots);
  params.sizes = output<int32_t>(sizes, ScalarType::Int, params.rows);
  kernels().expand_runs(params, workers());
}

// ---- k-means ----

const float* floats(const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel,
      "attnforge_native: rows and centroids must be contiguous fp32 of the shapes that fit");
  return static_cast<const float*>(t.const_data_ptr());
}

void nearest(const Tensor& x, const Tensor& centroids, const OptionalTensor& shift,
             const Tensor& labels) {
  NearestParams params;
  STD_TORCH_CHECK(x.dim() == 3 && centroids.dim() == 3,
                  "attnforge_native: rows and centroids must be [heads, n, dim]");
  params.heads = x.size(0), params.rows = x.size(1), params.dim = x.size(2);
  params.clusters = centroids.size(1);
  STD_TORCH_CHECK(params.clusters > 0 && params.dim > 0 && params.clusters < int64_t{1} << 31,
                  "attnforge_native: want at least one centroid");
  params.x = floats(x, params.heads * params.rows * params.dim);
  params.c = floats(centroids, params.heads * params.clusters * params.dim);
  if (shift) params.shift = floats(*shift, params.heads * params.clusters);
  params.labels = output<int64_t>(labels, ScalarType::Long, params.heads * params.rows);
  if (labels.numel() == 0) return;
  Tensor scratch = workspace(kernels().nearest_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().nearest(params, workers());
}

void cluster_sums(const Tensor& x, const Tensor& labels, const Tensor& sums, const Tensor& counts) {
  ClusterSumsParams params;
  STD_TORCH_CHECK(x.dim() == 3 && sums.dim() == 3 && labels.is_contiguous() &&
                      labels.scalar_type() == ScalarType::Long &&
                      labels.numel() == x.size(0) * x.size(1),
                  "attnforge_native: labels must be contiguous int64 [heads, n]");
  params.heads = x.size(0), params.rows = x.size(1), params.dim = x.size(2);
  params.clusters = sums.size(1);
  params.x = floats(x, params.heads * params.rows * params.dim);
  params.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  params.sums = output<float>(sums, ScalarType::Float, params.heads * params.clusters * params.dim);
  params.counts = output<int32_t>(counts, ScalarType::Int, params.heads * params.clusters);
  kernels().cluster_sums(params, workers());
}

// ---- LSH ----

void lsh_encode(const Tensor& x, const OptionalTensor& mean, const Tensor& planes, int64_t bits,
                const Tensor& codes) {
  LshEncodeParams params = lsh_encode_params(x, mean, planes, bits, codes);
  if (codes.numel() == 0) return;
  Tensor scratch = workspace(kernels().lsh_encode_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().lsh_encode(params, workers());
}

void lsh_insert(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& codes,
                const Tensor& first, const Tensor& count) {
  const LshInsertParams params = lsh_insert_params(starts, ids, bits, codes, first, count);
  // A look-up goes to one bucket of every table: a page each, if pages are small.
  advise_huge_pages(starts, starts.numel() * starts.element_size());
  advise_huge_pages(ids, ids.numel() * ids.element_size());
  kernels().lsh_insert(params, workers());
}

void lsh_truncate(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& length) {
  kernels().lsh_truncate(lsh_truncate_params(starts, ids, bits, length), workers());
}

void lsh_retrieve(const Tensor& starts, const Tensor& table_ids, int64_t bits, const Tensor& codes,
                  const Tensor& q, const Tensor& k, const OptionalTensor& mean, const Tensor& norms,
                  const Tensor& begin, const Tensor& end, int64_t min_hits, double clip,
                  const Tensor& ids, const Tensor& lens, const Tensor& log_bias) {
  LshRetrieveParams params = lsh_retrieve_params(starts, table_ids, bits, codes, q, k, mean, norms,
                                                 begin, end, min_hits, clip, ids, lens, log_bias);
  Tensor scratch = workspace(kernels().lsh_retrieve_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().lsh_retrieve(params, workers());
}

void lsh_attend(const Tensor& starts, const Tensor& table_ids, int64_t bits, const Tensor& codes,
                const Tensor& q, const Tensor& k, const OptionalTensor& mean, const Tensor& norms,
                const Tensor& begin, const Tensor& end, int64_t min_hits, double clip,
                const Tensor& v, const Tensor& length, double softmax_scale, const Tensor& out,
                const Tensor& lse) {
  LshAttendParams params;
  params.find = lsh_query_params(starts, table_ids, bits, codes, q, k, mean, norms, begin, end,
                                 min_hits, clip);
  FlashFwdParams& f = params.flash;
  f.problem = list_problem(q, k, v, std::nullopt, std::nullopt, softmax_scale);
  const FlashProblem& p = f.problem;
  f.q = ref(q, p.dtype), f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  f.out = ref(out, p.dtype), f.lse = stat(lse);
  params.length = per_sequence(length, params.find.tables);
  if (out.numel() == 0) return;
  Tensor scratch = workspace(kernels().lsh_attend_workspace(params, workers().num_threads));
  f.workspace = scratch.mutable_data_ptr();
  kernels().lsh_attend(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "indexed_fwd(Tensor q, Tensor k, Tensor v, Tensor ids, Tensor? lens, Tensor? log_bias, "
      "Tensor? block_table, Tensor? cache_seqlens, float softmax_scale, Tensor(a!) out, "
      "Tensor(b!) lse, Tensor(c!)? out_lo) -> ()");
  m.def(
      "indexed_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? out_lo, Tensor ids, Tensor? lens, Tensor? log_bias, Tensor? cache_seqlens, "
      "float softmax_scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dlog_bias) "
      "-> ()");
  m.def(
      "key_scores(Tensor q, Tensor k, Tensor? block_table, Tensor? cache_seqlens, Tensor? counts, "
      "float softmax_scale, Tensor(a!) out) -> ()");
  m.def(
      "page_scores(Tensor q, Tensor low, Tensor high, Tensor? page_scale, Tensor? block_table, "
      "Tensor? used, float softmax_scale, bool grouped, Tensor(a!) out) -> ()");
  m.def(
      "select_columns(Tensor scores, Tensor? used, int kind, int k, Tensor? threshold, float mass, "
      "int first, int last, Tensor(a!) ids, Tensor(b!) lens) -> ()");
  m.def(
      "expand_runs(Tensor columns, Tensor? lens, Tensor starts, int tail_begin, int tail_end, "
      "Tensor(a!) ids, Tensor(b!) sizes) -> ()");
  m.def("nearest(Tensor x, Tensor centroids, Tensor? shift, Tensor(a!) labels) -> ()");
  m.def("cluster_sums(Tensor x, Tensor labels, Tensor(a!) sums, Tensor(b!) counts) -> ()");
  m.def("lsh_encode(Tensor x, Tensor? mean, Tensor planes, int bits, Tensor(a!) codes) -> ()");
  m.def(
      "lsh_insert(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor codes, Tensor first, Tensor "
      "count) -> ()");
  m.def("lsh_truncate(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor length) -> ()");
  m.def(
      "lsh_retrieve(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor k, "
      "Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, Tensor(a!) "
      "ids, Tensor(b!) lens, Tensor(c!) log_bias) -> ()");
  m.def(
      "lsh_attend(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor k, "
      "Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, Tensor v, "
      "Tensor length, float softmax_scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("indexed_fwd", TORCH_BOX(&attnforge::cpu::indexed_fwd));
  m.impl("indexed_bwd", TORCH_BOX(&attnforge::cpu::indexed_bwd));
  m.impl("key_scores", TORCH_BOX(&attnforge::cpu::key_scores));
  m.impl("page_scores", TORCH_BOX(&attnforge::cpu::page_scores));
  m.impl("select_columns", TORCH_BOX(&attnforge::cpu::select_columns));
  m.impl("expand_runs", TORCH_BOX(&attnforge::cpu::expand_runs));
  m.impl("nearest", TORCH_BOX(&attnforge::cpu::nearest));
  m.impl("cluster_sums", TORCH_BOX(&attnforge::cpu::cluster_sums));
  m.impl("lsh_encode", TORCH_BOX(&attnforge::cpu::lsh_encode));
  m.impl("lsh_insert", TORCH_BOX(&attnforge::cpu::lsh_insert));
  m.impl("lsh_truncate", TORCH_BOX(&attnforge::cpu::lsh_truncate));
  m.impl("lsh_retrieve", TORCH_BOX(&attnforge::cpu::lsh_retrieve));
  m.impl("lsh_attend", TORCH_BOX(&attnforge::cpu::lsh_attend));
}
