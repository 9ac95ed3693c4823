// Private CUDA operators over the torch-free launchers: unpack tensors into params structs, call.
// LibTorch stable ABI only, and nothing of libtorch_cuda: the stream comes as a number, workspaces
// as tensors, and the caller has made the tensors' device the current one. So the library loads
// under a torch without CUDA.
//
// The same file, compiled with ATTNFORGE_EMULATE, gives the emulated twin of the library: the same
// operators over CPU tensors, in the namespace attnforge_emulated.
#include "bindings/cuda.h"

namespace attnforge::cuda {
namespace {

void set_tensors(FlashFwdParams& params, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& out, const Tensor& lse) {
  const DType dtype = params.problem.dtype;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v"), check_aligned(out, "out");
  params.q = ref(q, dtype), params.k = ref(k, dtype), params.v = ref(v, dtype);
  params.out = ref(out, dtype);
  params.lse = stat(lse);
}

// Kernels of the sm_80 class, or those for sm_90a.
enum class Class { kSm80, kSm90 };

// TMA has no rows that lie on top of each other. with_q: it loads Q too.
template <class Params>
void check_for_tma(const Params& params, bool with_q = true) {
  const FlashProblem& p = params.problem;
  const auto check_rows = [](const TensorRef& t, const char* name, int64_t rows) {
    STD_TORCH_CHECK(t.seq_stride != 0 || rows <= 1, "attnforge_native: rows of ", name,
                    " must not be broadcast, TMA cannot read them; their stride is 0");
  };
  const int64_t rows = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  const int64_t keys = p.cu_seqlens_k == nullptr ? p.seqlen_k : p.total_k;
  if (with_q) check_rows(params.q, "q", rows);
  check_rows(params.k, "k", keys), check_rows(params.v, "v", keys);
  if constexpr (requires { params.dout; }) check_rows(params.dout, "dout", rows);
}

template <Class kClass>
int launch_fwd(const FlashFwdParams& params, void* stream) {
  if constexpr (kClass == Class::kSm80) {
    return with_dtype(params.problem.dtype, [&]<DType kDType>() {
      return flash_fwd_rows<kDType>(params, SplitParams{}, false, stream);
    });
  }
#if defined(ATTNFORGE_SM90A)
  check_for_tma(params);
  const DType dtype = params.problem.dtype;
  if (dtype == DType::kFloat16) return flash_fwd_sm90<DType::kFloat16>(params, stream);
  if (dtype == DType::kBFloat16) return flash_fwd_sm90<DType::kBFloat16>(params, stream);
#endif
  return kNoKernel;
}

template <Class kClass>
void fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Tensor& out,
         const Tensor& lse, const OptionalTensor& out_lo, int64_t max_seqlen_q,
         int64_t max_seqlen_k, double softmax_scale, int64_t window_left, int64_t window_right,
         double softcap, int64_t stream) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  set_tensors(params, q, k, v, out, lse);
  params.out_lo = ref(out_lo, p.dtype);
  check(launch_fwd<kClass>(params, stream_of(stream)),
        kClass == Class::kSm80 ? "cuda_flash_fwd" : "cuda_flash_fwd_sm90");
}

// q, k, v e4m3; out of any other dtype. qk_descale, v_descale: fp32 [B, Hk].
void fwd_fp8(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
             const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
             const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Tensor& out,
             const Tensor& lse, const OptionalTensor& qk_descale, const OptionalTensor& v_descale,
             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
             int64_t window_right, double softcap, int64_t stream) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap, true});
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v"), check_aligned(out, "out");
  params.q = ref(q, DType::kFloat8), params.k = ref(k, DType::kFloat8);
  params.v = ref(v, DType::kFloat8);
  p.out_dtype = dtype_of(out);
  params.out = ref(out, p.out_dtype);
  params.lse = stat(lse);
  const int64_t factors = p.batch * p.heads_k;
  STD_TORCH_CHECK((!qk_descale || qk_descale->numel() == factors) &&
                      (!v_descale || v_descale->numel() == factors),
                  "attnforge_native::cuda_flash_fwd_fp8_sm90: descales must be [batch, kv heads]");
  p.mods.qk_descale = data<float>(qk_descale, ScalarType::Float);
  p.mods.v_descale = data<float>(v_descale, ScalarType::Float);
  int error = kNoKernel;
#if defined(ATTNFORGE_SM90A)
  check_for_tma(params);
  error = flash_fwd_fp8_sm90(params, stream_of(stream));
#endif
  check(error, "cuda_flash_fwd_fp8_sm90");
}

template <Class kClass>
int launch_decode(const FlashFwdParams& params, const SplitParams& splits, void* stream) {
  const DType dtype = params.problem.dtype;
  if constexpr (kClass == Class::kSm80) {
    return with_dtype(dtype,
                      [&]<DType kDType>() { return flash_decode<kDType>(params, splits, stream); });
  }
#if defined(ATTNFORGE_SM90A)
  check_for_tma(params, false);
  if (dtype == DType::kFloat16) return flash_decode_sm90<DType::kFloat16>(params, splits, stream);
  if (dtype == DType::kBFloat16) return flash_decode_sm90<DType::kBFloat16>(params, splits, stream);
#endif
  return kNoKernel;
}

// parts, part_lses: fp32 [splits, B, Sq, Hq, Dv] and [splits, B, Hq, Sq] for several splits.
template <Class kClass>
void decode(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& seqused_k,
            const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Tensor& out,
            const Tensor& lse, const OptionalTensor& parts, const OptionalTensor& part_lses,
            double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
            int64_t split_keys, int64_t stream) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, std::nullopt, std::nullopt, seqused_k, alibi_slopes, sinks, q.size(1),
              k.size(1), {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  set_tensors(params, q, k, v, out, lse);
  SplitParams splits;
  if (parts) {
    const int64_t count = parts->size(0);
    STD_TORCH_CHECK(part_lses &&
                        parts->numel() == count * p.batch * p.seqlen_q * p.heads_q * p.v_head_dim &&
                        part_lses->numel() == count * p.batch * p.seqlen_q * p.heads_q,
                    "attnforge_native::cuda_flash_decode: parts and part_lses do not fit the call");
    splits.splits = count;
    splits.keys = split_keys;
    set_parts(splits, *parts, *part_lses, p);
  }
  check(launch_decode<kClass>(params, splits, stream_of(stream)),
        kClass == Class::kSm80 ? "cuda_flash_decode" : "cuda_flash_decode_sm90");
}

template <Class kClass, DType kDType>
int launch_bwd(const FlashBwdParams& params, void* stream) {
  if (const int error = flash_delta<kDType>(params, stream)) return error;
  if constexpr (kClass == Class::kSm80) {
    const int error = flash_dkdv<kDType>(params, stream);
    return error != 0 ? error : flash_dq<kDType>(params, stream);
  }
#if defined(ATTNFORGE_SM90A)
  if constexpr (kClass == Class::kSm90 && kDType != DType::kFloat32) {
    check_for_tma(params);
    const int error = flash_dkdv_sm90<kDType>(params, stream);
    return error != 0 ? error : flash_dq_sm90<kDType>(params, stream);
  }
#endif
  return kNoKernel;
}

template <Class kClass>
void bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
         const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
         const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
         const OptionalTensor& sinks, const Tensor& dq, const Tensor& dk, const Tensor& dv,
         const Tensor& delta, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
         int64_t window_left, int64_t window_right, double softcap, int64_t stream) {
  FlashBwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v");
  check_aligned(dout, "dout");
  check_aligned(dq, "dq"), check_aligned(dk, "dk"), check_aligned(dv, "dv");
  params.dout = ref(dout, p.dtype);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  params.lse = stat(lse);
  if (dlse) params.dlse = stat(*dlse);
  params.delta = stat(delta);
  check(with_dtype(
            p.dtype,
            [&]<DType kDType>() { return launch_bwd<kClass, kDType>(params, stream_of(stream)); }),
        kClass == Class::kSm80 ? "cuda_flash_bwd" : "cuda_flash_bwd_sm90");
}

void merge(const Tensor& outs, const Tensor& lses, const Tensor& out, const Tensor& lse,
           bool inf_is_empty, int64_t stream) {
  STD_TORCH_CHECK((outs.dim() == 4 || outs.dim() == 5) && outs.is_contiguous() &&
                      lses.is_contiguous() && out.is_contiguous() && lse.is_contiguous() &&
                      lses.scalar_type() == ScalarType::Float &&
                      (outs.scalar_type() == ScalarType::Float || dtype_of(out) == dtype_of(outs)),
                  "attnforge_native::cuda_merge_states wants contiguous [N, B, S, H, D] and "
                  "[N, B, H, S]");
  MergeParams params;
  const int64_t s = outs.dim() - 3;
  params.dtype = dtype_of(out);
  params.states = outs.size(0);
  params.batch = s == 2 ? outs.size(1) : 1;
  params.seqlen = outs.size(s), params.heads = outs.size(s + 1), params.dim = outs.size(s + 2);
  STD_TORCH_CHECK(lses.numel() == params.states * params.batch * params.seqlen * params.heads &&
                      out.numel() * params.states == outs.numel() &&
                      lse.numel() * params.states == lses.numel(),
                  "attnforge_native::cuda_merge_states got tensors that differ in shape");
  params.outs = outs.const_data_ptr();
  params.lses = static_cast<const float*>(lses.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  check(
      flash_merge(params, outs.scalar_type() == ScalarType::Float, inf_is_empty, stream_of(stream)),
      "cuda_merge_states");
}

}  // namespace
}  // namespace attnforge::cuda

#define ATTNFORGE_SCORES "float softmax_scale, int window_left, int window_right, float softcap, "
#define ATTNFORGE_EXTRAS "Tensor? alibi_slopes, Tensor? sinks, "
#define ATTNFORGE_VARLEN "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "

#define ATTNFORGE_FWD                                                          \
  "(Tensor q, Tensor k, Tensor v, " ATTNFORGE_VARLEN ATTNFORGE_EXTRAS          \
  "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo, int max_seqlen_q, int " \
  "max_seqlen_k, " ATTNFORGE_SCORES "int stream) -> ()"
#define ATTNFORGE_DECODE                                                                        \
  "(Tensor q, Tensor k, Tensor v, Tensor? seqused_k, " ATTNFORGE_EXTRAS                         \
  "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? parts, Tensor(d!)? part_lses, " ATTNFORGE_SCORES \
  "int split_keys, int stream) -> ()"

#define ATTNFORGE_BWD                                                                          \
  "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? " \
  "out_lo, " ATTNFORGE_VARLEN ATTNFORGE_EXTRAS                                                 \
  "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, int max_seqlen_q, int "      \
  "max_seqlen_k, " ATTNFORGE_SCORES "int stream) -> ()"

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def("cuda_flash_fwd" ATTNFORGE_FWD);
  m.def("cuda_flash_fwd_sm90" ATTNFORGE_FWD);
  m.def("cuda_flash_fwd_fp8_sm90(Tensor q, Tensor k, Tensor v, " ATTNFORGE_VARLEN ATTNFORGE_EXTRAS
        "Tensor(a!) out, Tensor(b!) lse, Tensor? qk_descale, Tensor? v_descale, int max_seqlen_q, "
        "int "
        "max_seqlen_k, " ATTNFORGE_SCORES "int stream) -> ()");
  m.def("cuda_flash_decode" ATTNFORGE_DECODE);
  m.def("cuda_flash_decode_sm90" ATTNFORGE_DECODE);
  m.def("cuda_flash_bwd" ATTNFORGE_BWD);
  m.def("cuda_flash_bwd_sm90" ATTNFORGE_BWD);
  m.def(
      "cuda_merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse, "
      "bool inf_is_empty, int stream) -> ()");
  m.def("cuda_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_flash_fwd", TORCH_BOX(&attnforge::cuda::fwd<attnforge::cuda::Class::kSm80>));
  m.impl("cuda_flash_fwd_sm90", TORCH_BOX(&attnforge::cuda::fwd<attnforge::cuda::Class::kSm90>));
  m.impl("cuda_flash_fwd_fp8_sm90", TORCH_BOX(&attnforge::cuda::fwd_fp8));
  m.impl("cuda_flash_decode", TORCH_BOX(&attnforge::cuda::decode<attnforge::cuda::Class::kSm80>));
  m.impl("cuda_flash_decode_sm90",
         TORCH_BOX(&attnforge::cuda::decode<attnforge::cuda::Class::kSm90>));
  m.impl("cuda_flash_bwd", TORCH_BOX(&attnforge::cuda::bwd<attnforge::cuda::Class::kSm80>));
  m.impl("cuda_flash_bwd_sm90", TORCH_BOX(&attnforge::cuda::bwd<attnforge::cuda::Class::kSm90>));
  m.impl("cuda_merge_states", TORCH_BOX(&attnforge::cuda::merge));
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&attnforge::cuda::build_text));
}
