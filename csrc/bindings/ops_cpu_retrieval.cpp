// Private CPU operators of the retrieval family (namespace attnforge_native): see ops_cpu.cpp.
#include "bindings/retrieval.h"

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
  IndexedBwdParams params;
  FlashBwdParams& f = params.flash;
  FlashProblem& p = f.problem;
  p = list_problem(q, k, v, std::nullopt, used, softmax_scale);
  if (empty(p)) return;
  params.lists = lists_of(p, ids, lens, log_bias);
  f.dout = ref(dout, p.dtype);
  f.q = ref(q, p.dtype), f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  f.out = ref(out, p.dtype), f.out_lo = ref(out_lo, p.dtype);
  f.dq = ref(dq, p.dtype), f.dk = ref(dk, p.dtype), f.dv = ref(dv, p.dtype);
  f.lse = stat(lse);
  if (dlse) f.dlse = stat(*dlse);
  if (dlog_bias) {
    const int64_t heads = std::max(params.lists.heads, p.heads_k);
    STD_TORCH_CHECK(dlog_bias->scalar_type() == ScalarType::Float && dlog_bias->is_contiguous() &&
                        dlog_bias->numel() == p.batch * heads * params.lists.slots,
                    "attnforge_native: dlog_bias must be contiguous fp32, per list and KV head");
    params.dlog_bias = static_cast<float*>(dlog_bias->mutable_data_ptr());
  }
  Tensor scratch = workspace(kernels().indexed_bwd_workspace(params, workers().num_threads));
  f.workspace = scratch.mutable_data_ptr();
  kernels().indexed_bwd(params, workers());
}

// ---- scores and selection ----

template <class T>
T* output(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel,
                  "attnforge_native: a tensor has the wrong dtype, layout or size");
  return static_cast<T*>(t.mutable_data_ptr());
}

PagePool key_pool(const FlashProblem& p, const Tensor& k, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int &&
                      table.size(0) == p.batch && table.is_contiguous(),
                  "attnforge_native: block_table must be contiguous int32 rows");
  PagePool pool;
  pool.k = pool.v = ref(k, p.dtype);
  pool.pages = k.size(0), pool.page_size = k.size(1);
  pool.table = static_cast<const int32_t*>(table.const_data_ptr());
  pool.table_stride = table.size(1);
  return pool;
}

void key_scores(const Tensor& q, const Tensor& k, const OptionalTensor& table,
                const OptionalTensor& used, const OptionalTensor& counts, double softmax_scale,
                const Tensor& out) {
  KeyScoresParams params;
  FlashProblem& p = params.problem;
  p = list_problem(q, k, k, table, used, softmax_scale);
  params.columns = out.size(3);
  STD_TORCH_CHECK(params.columns <= p.seqlen_k, "attnforge_native: more columns than keys");
  params.out =
      output<float>(out, ScalarType::Float, p.batch * p.heads_q * p.seqlen_q * params.columns);
  STD_TORCH_CHECK(!counts || counts->numel() == p.batch * p.heads_k * params.columns,
                  "attnforge_native: counts must be [batch, heads, keys]");
  params.counts = data<int32_t>(counts, ScalarType::Int);
  params.q = ref(q, p.dtype);
  if (table) {
    params.pool = key_pool(p, k, *table);
  } else {
    params.k = ref(k, p.dtype);
  }
  if (!empty(p) && out.numel() > 0) kernels().key_scores(params, workers());
}

// low and high: [pages, heads, dim] beside a table, else [batch, pages, heads, dim].
void page_scores(const Tensor& q, const Tensor& low, const Tensor& high,
                 const OptionalTensor& table, const OptionalTensor& used, double softmax_scale,
                 bool grouped, const Tensor& out) {
  PageScoresParams params;
  FlashProblem& p = params.problem;
  STD_TORCH_CHECK(q.dim() == 4 && low.dim() == (table ? 3 : 4) && high.dim() == low.dim() &&
                      low.numel() == high.numel() && low.scalar_type() == high.scalar_type() &&
                      low.stride(low.dim() - 1) == 1 && high.stride(low.dim() - 1) == 1,
                  "attnforge_native: q, low and high do not fit");
  const int64_t h = low.dim() - 2;
  p.q_dtype = dtype_of(q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.heads_q = q.size(2), p.head_dim = q.size(3);
  p.heads_k = low.size(h);
  STD_TORCH_CHECK(p.heads_k > 0 && p.heads_q % p.heads_k == 0 && low.size(h + 1) == p.head_dim &&
                      p.head_dim <= 576 && (table || low.size(0) == p.batch),
                  "attnforge_native: shapes of q, low and high do not fit");
  p.softmax_scale = static_cast<float>(softmax_scale);
  params.bounds_dtype = dtype_of(low);
  params.q = ref(q, p.q_dtype);
  auto bounds = [&](const Tensor& t) {
    const int64_t page = table ? 0 : t.stride(1);
    return TensorRef{const_cast<void*>(t.const_data_ptr()), t.stride(0), page, t.stride(h)};
  };
  params.low = bounds(low), params.high = bounds(high);
  params.pages = low.size(0);
  params.columns = out.size(3);
  if (table) {
    STD_TORCH_CHECK(table->is_contiguous() && table->size(0) == p.batch &&
                        table->size(1) >= params.columns && params.pages > 0,
                    "attnforge_native: block_table does not fit");
    params.table = data<int32_t>(table, ScalarType::Int);
    params.table_stride = table->size(1);
  } else {
    STD_TORCH_CHECK(params.columns <= low.size(1), "attnforge_native: more columns than pages");
  }
  params.used = data<int32_t>(used, ScalarType::Int);
  params.grouped = grouped;
  const int64_t rows = p.batch * (grouped ? p.heads_k : p.heads_q) * p.seqlen_q;
  params.out = output<float>(out, ScalarType::Float, rows * params.columns);
  if (out.numel() == 0) return;
  Tensor scratch = workspace(kernels().page_scores_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().page_scores(params, workers());
}

// scores [rows, columns]; threshold has one entry or one per row.
void select_columns(const Tensor& scores, const OptionalTensor& used, int64_t kind, int64_t k,
                    const OptionalTensor& threshold, double mass, int64_t first, int64_t last,
                    const Tensor& ids, const Tensor& lens) {
  SelectParams params;
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_contiguous() &&
                      scores.scalar_type() == ScalarType::Float && ids.dim() == 2,
                  "attnforge_native: scores must be contiguous fp32 rows");
  params.kind = static_cast<SelectKind>(kind);
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.rows = scores.size(0), params.columns = scores.size(1);
  STD_TORCH_CHECK((!used || used->numel() == params.rows) &&
                      (!threshold || threshold->numel() == 1 || threshold->numel() == params.rows),
                  "attnforge_native: lengths and thresholds are one per row");
  params.used = data<int32_t>(used, ScalarType::Int);
  params.threshold = data<float>(threshold, ScalarType::Float);
  params.threshold_stride = threshold && threshold->numel() > 1;
  STD_TORCH_CHECK(params.kind != SelectKind::kThreshold || params.threshold,
                  "attnforge_native: a threshold is missing");
  params.k = k, params.mass = mass, params.first = first, params.last = last;
  params.slots = ids.size(1);
  params.ids = output<int32_t>(ids, ScalarType::Int, params.rows * params.slots);
  params.lens = output<int32_t>(lens, ScalarType::Int, params.rows);
  kernels().select_columns(params, workers());
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
  LshEncodeParams params;
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(3) % 8 == 0 && x.size(3) > 0 && x.size(3) <= 256 && codes.dim() == 4,
      "attnforge_native: x must be [batch, seq, heads, dim] with a dim of at most 256");
  params.dtype = dtype_of(x);
  params.batch = x.size(0), params.seqlen = x.size(1), params.heads = x.size(2);
  params.dim = x.size(3), params.bits = bits, params.tables = codes.size(3);
  STD_TORCH_CHECK(bits >= 0 && bits <= 15 && params.tables > 0,
                  "attnforge_native: codes have 0 to 15 bits");
  STD_TORCH_CHECK(!mean || mean->numel() == params.batch * params.heads * params.dim,
                  "attnforge_native: mean must be [batch, heads, dim]");
  params.x = ref(x, params.dtype);
  params.mean = data<float>(mean, ScalarType::Float);
  STD_TORCH_CHECK(planes.scalar_type() == ScalarType::Float && planes.is_contiguous() &&
                      planes.numel() == params.dim * bits * params.tables,
                  "attnforge_native: planes must be contiguous fp32 [dim, bits * tables]");
  params.planes = static_cast<const float*>(planes.const_data_ptr());
  params.codes = output<uint16_t>(codes, ScalarType::Short,
                                  params.batch * params.heads * params.seqlen * params.tables);
  if (codes.numel() == 0) return;
  Tensor scratch = workspace(kernels().lsh_encode_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().lsh_encode(params, workers());
}

// starts [batch, heads, segments, tables, 2^bits + 1], ids [.., segment] int16.
LshTables tables_of(const Tensor& starts, const Tensor& ids, int64_t bits) {
  STD_TORCH_CHECK(starts.dim() == 5 && ids.dim() == 5 && bits >= 0 && bits <= 15 &&
                      starts.size(4) == (int64_t{1} << bits) + 1 && ids.size(4) <= 65536,
                  "attnforge_native: tables of another shape");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(starts.size(d) == ids.size(d), "attnforge_native: starts and ids do not fit");
  }
  LshTables t;
  t.batch = ids.size(0), t.heads = ids.size(1), t.segments = ids.size(2), t.tables = ids.size(3);
  t.bits = bits, t.segment = ids.size(4);
  t.starts = output<int32_t>(starts, ScalarType::Int, starts.numel());
  t.ids = output<uint16_t>(ids, ScalarType::Short, ids.numel());
  return t;
}

const int32_t* per_sequence(const Tensor& t, const LshTables& tables) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == tables.batch,
      "attnforge_native: lengths must be int32, one per sequence");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

void lsh_insert(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& codes,
                const Tensor& first, const Tensor& count) {
  LshInsertParams params;
  params.tables = tables_of(starts, ids, bits);
  const LshTables& t = params.tables;
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() &&
                      codes.scalar_type() == ScalarType::Short && codes.size(0) == t.batch &&
                      codes.size(1) == t.heads && codes.size(3) == t.tables,
                  "attnforge_native: codes must be int16 [batch, heads, rows, tables]");
  params.codes = static_cast<const uint16_t*>(codes.const_data_ptr());
  params.rows = codes.size(2);
  params.first = per_sequence(first, t), params.count = per_sequence(count, t);
  // A look-up goes to one bucket of every table: a page each, if pages are small.
  advise_huge_pages(starts, starts.numel() * starts.element_size());
  advise_huge_pages(ids, ids.numel() * ids.element_size());
  kernels().lsh_insert(params, workers());
}

void lsh_truncate(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& length) {
  LshTruncateParams params;
  params.tables = tables_of(starts, ids, bits);
  params.length = per_sequence(length, params.tables);
  kernels().lsh_truncate(params, workers());
}

// What a look-up is asked, but for its outputs.
LshRetrieveParams look_up(const Tensor& starts, const Tensor& table_ids, int64_t bits,
                          const Tensor& codes, const Tensor& q, const Tensor& k,
                          const OptionalTensor& mean, const Tensor& norms, const Tensor& begin,
                          const Tensor& end, int64_t min_hits, double clip) {
  LshRetrieveParams params;
  params.tables = tables_of(starts, table_ids, bits);
  const LshTables& t = params.tables;
  FlashProblem& p = params.problem;
  p = list_problem(q, k, k, std::nullopt, std::nullopt, 1.0);
  STD_TORCH_CHECK(p.seqlen_q == 1 && p.batch == t.batch && p.heads_k == t.heads &&
                      p.head_dim <= 256 && codes.scalar_type() == ScalarType::Short &&
                      codes.is_contiguous() && codes.numel() == p.batch * p.heads_q * t.tables,
                  "attnforge_native: one query per sequence, with its codes");
  STD_TORCH_CHECK(norms.dim() == 3 && norms.is_contiguous() && norms.size(0) == p.batch &&
                      norms.size(1) == p.heads_k && norms.size(2) >= p.seqlen_k &&
                      norms.scalar_type() == ScalarType::Float,
                  "attnforge_native: norms must be fp32 [batch, heads, keys]");
  STD_TORCH_CHECK(!mean || mean->numel() == p.batch * p.heads_k * p.head_dim,
                  "attnforge_native: mean must be [batch, heads, dim]");
  STD_TORCH_CHECK(min_hits == 1 || min_hits == 2, "attnforge_native: min_hits is 1 or 2");
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype);
  params.codes = static_cast<const uint16_t*>(codes.const_data_ptr());
  params.mean = data<float>(mean, ScalarType::Float);
  params.norms = static_cast<const float*>(norms.const_data_ptr());
  params.norm_stride = norms.size(2);
  params.begin = per_sequence(begin, t), params.end = per_sequence(end, t);
  params.min_hits = min_hits, params.clip = static_cast<float>(clip);
  return params;
}

void lsh_retrieve(const Tensor& starts, const Tensor& table_ids, int64_t bits, const Tensor& codes,
                  const Tensor& q, const Tensor& k, const OptionalTensor& mean, const Tensor& norms,
                  const Tensor& begin, const Tensor& end, int64_t min_hits, double clip,
                  const Tensor& ids, const Tensor& lens, const Tensor& log_bias) {
  LshRetrieveParams params =
      look_up(starts, table_ids, bits, codes, q, k, mean, norms, begin, end, min_hits, clip);
  const FlashProblem& p = params.problem;
  params.slots = ids.size(ids.dim() - 1);
  params.ids = output<int32_t>(ids, ScalarType::Int, p.batch * p.heads_q * params.slots);
  params.lens = output<int32_t>(lens, ScalarType::Int, p.batch * p.heads_q);
  params.log_bias = output<float>(log_bias, ScalarType::Float, ids.numel());
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
  params.find =
      look_up(starts, table_ids, bits, codes, q, k, mean, norms, begin, end, min_hits, clip);
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
      "page_scores(Tensor q, Tensor low, Tensor high, Tensor? block_table, Tensor? used, float "
      "softmax_scale, bool grouped, Tensor(a!) out) -> ()");
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
