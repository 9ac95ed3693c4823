# libattnforge_cuda.so: the CUDA kernels by nvcc, and their bindings. Sets cuda_status for the report.
#
# A kernel source is compiled once per dtype, so that a build is parallel and an edit recompiles
# little. The emulated twin (emulated/CMakeLists.txt) has the same list.
set(cuda_dir "${CMAKE_SOURCE_DIR}/csrc/cuda")
set(cuda_dtypes kFloat32 kFloat16 kBFloat16)
file(GLOB cuda_per_dtype CONFIGURE_DEPENDS
     "${cuda_dir}/flash/fwd*.cu" "${cuda_dir}/flash/decode*.cu" "${cuda_dir}/flash/bwd*.cu"
     "${cuda_dir}/paged/decode.cu" "${cuda_dir}/paged/prefill.cu" "${cuda_dir}/paged/latent.cu"
     "${cuda_dir}/linear/walk.cu" "${cuda_dir}/linear/delta.cu"
     "${cuda_dir}/block_sparse/*.cu"
     "${cuda_dir}/retrieval/indexed_fwd.cu" "${cuda_dir}/retrieval/indexed_dq.cu"
     "${cuda_dir}/retrieval/indexed_dkdv.cu" "${cuda_dir}/retrieval/key_scores.cu")
# The kernels for sm_90a: code of that one architecture, of the 16-bit dtypes or fp8.
file(GLOB cuda_sm90_halves CONFIGURE_DEPENDS "${cuda_dir}/flash/sm90/*.cu")
set(cuda_sm90_kFloat8 "${cuda_dir}/flash/sm90/fwd_fp8.cu")
list(REMOVE_ITEM cuda_sm90_halves ${cuda_sm90_kFloat8})
set(cuda_sm90_kFloat16 ${cuda_sm90_halves})
set(cuda_sm90_kBFloat16 ${cuda_sm90_halves})
set(cuda_sm90_dtypes kFloat16 kBFloat16 kFloat8)
set(cuda_once "${cuda_dir}/flash/merge.cu" "${cuda_dir}/paged/append.cu" "${cuda_dir}/paged/combine.cu"
    "${cuda_dir}/linear/chunk.cu" "${cuda_dir}/linear/gates.cu" "${cuda_dir}/linear/step.cu"
    "${cuda_dir}/linear/delta_chunk.cu" "${cuda_dir}/linear/delta_step.cu"
    "${cuda_dir}/linear/diag_scan.cu"
    "${cuda_dir}/retrieval/indexed_sum.cu" "${cuda_dir}/retrieval/shares.cu"
    "${cuda_dir}/retrieval/page_scores.cu" "${cuda_dir}/retrieval/select.cu"
    "${cuda_dir}/retrieval/lsh_encode.cu" "${cuda_dir}/retrieval/lsh_collect.cu"
    "${cuda_dir}/retrieval/lsh_weigh.cu" "${cuda_dir}/retrieval/lsh_tables.cu"
    "${cuda_dir}/runtime.cu")
set(cuda_bindings "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_paged.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_linear.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_delta.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_block_sparse.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_retrieval.cpp")

# attnforge_cuda_library(<name> <with sm_90a>): bindings and kernels, one part per dtype.
function(attnforge_cuda_library name with_sm90)
  add_library(${name} SHARED ${cuda_once} ${cuda_bindings})
  set(includes "${CMAKE_SOURCE_DIR}/csrc" "${CMAKE_SOURCE_DIR}/csrc/include")
  foreach(dtype IN LISTS cuda_dtypes)
    add_library(${name}_${dtype} OBJECT ${cuda_per_dtype})
    target_compile_definitions(${name}_${dtype} PRIVATE ATTNFORGE_DTYPE=${dtype})
    target_include_directories(${name}_${dtype} PRIVATE ${includes})
    target_link_libraries(${name} PRIVATE ${name}_${dtype})
  endforeach()
  if(with_sm90)
    foreach(dtype IN LISTS cuda_sm90_dtypes)
      add_library(${name}_sm90_${dtype} OBJECT ${cuda_sm90_${dtype}})
      target_compile_definitions(${name}_sm90_${dtype} PRIVATE ATTNFORGE_DTYPE=${dtype})
      target_include_directories(${name}_sm90_${dtype} PRIVATE ${includes})
      set_target_properties(${name}_sm90_${dtype} PROPERTIES CUDA_ARCHITECTURES "90a-real")
      target_link_libraries(${name} PRIVATE ${name}_sm90_${dtype})
    endforeach()
    target_compile_definitions(${name} PRIVATE ATTNFORGE_SM90A=1)
  endif()
  target_include_directories(${name} PRIVATE ${includes})
  target_include_directories(${name} SYSTEM PRIVATE "${ATTNFORGE_TORCH_DIR}/include")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL)
  target_link_libraries(${name} PRIVATE "${TORCH_CPU_LIBRARY}")
  set_target_properties(${name} PROPERTIES SKIP_BUILD_RPATH ON)
  target_link_options(${name} PRIVATE -Wl,--as-needed -Wl,--exclude-libs,ALL -Wl,-z,defs)
endfunction()

string(TOLOWER "${ATTNFORGE_CUDA}" cuda_wanted)
set(cuda_status "left out: not asked for")
if(NOT cuda_wanted STREQUAL "off")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # 90a asks for the kernels of sm_90a beside the others, whose code for that GPU is 90's.
    set(cuda_class_archs ${ATTNFORGE_CUDA_ARCHS})
    list(REMOVE_ITEM cuda_class_archs "90a")
    if(NOT cuda_class_archs)
      message(FATAL_ERROR "attnforge: ATTNFORGE_CUDA_ARCHS has 90a alone; the kernels of the sm_80 "
                          "class need an architecture too, for example 80;90a or 90;90a")
    endif()
    set(cuda_with_sm90 OFF)
    if("90a" IN_LIST ATTNFORGE_CUDA_ARCHS)
      set(cuda_with_sm90 ON)
    endif()
    list(TRANSFORM cuda_class_archs APPEND "-real" OUTPUT_VARIABLE cuda_code)
    list(GET cuda_class_archs 0 cuda_first)
    set(CMAKE_CUDA_ARCHITECTURES ${cuda_code} "${cuda_first}-virtual")
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER_LAUNCHER)
      set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})  # ccache, if anybody uses it
    endif()
    # Machine code for several architectures is most of a wheel.
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -Xfatbin=-compress-all")
    attnforge_cuda_library(attnforge_cuda ${cuda_with_sm90})
    set_target_properties(attnforge_cuda PROPERTIES
                          LIBRARY_OUTPUT_DIRECTORY "${ATTNFORGE_OUTPUT_DIR}/lib")
    list(JOIN ATTNFORGE_CUDA_ARCHS " " cuda_arch_text)
    set(cuda_status "built by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_arch_text}")
  elseif(cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "attnforge: ATTNFORGE_CUDA=on, but there is no nvcc on PATH (nor CUDACXX)")
  else()
    set(cuda_status "left out: no nvcc on PATH (nor CUDACXX)")
  endif()
endif()
