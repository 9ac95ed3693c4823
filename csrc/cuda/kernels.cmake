# libattnforge_cuda.so: the CUDA kernels by nvcc, and their bindings. Sets cuda_status for the report.
#
# A kernel source is compiled once per dtype, so that a build is parallel and an edit recompiles
# little. The emulated twin (emulated/CMakeLists.txt) has the same list.
set(cuda_dir "${CMAKE_SOURCE_DIR}/csrc/cuda")
set(cuda_dtypes kFloat32 kFloat16 kBFloat16)
file(GLOB cuda_per_dtype CONFIGURE_DEPENDS
     "${cuda_dir}/flash/fwd*.cu" "${cuda_dir}/flash/decode*.cu" "${cuda_dir}/flash/bwd*.cu"
     "${cuda_dir}/paged/decode.cu" "${cuda_dir}/paged/prefill.cu" "${cuda_dir}/paged/latent.cu")
set(cuda_once "${cuda_dir}/flash/merge.cu" "${cuda_dir}/paged/append.cu" "${cuda_dir}/paged/combine.cu"
    "${cuda_dir}/runtime.cu")
set(cuda_bindings "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda.cpp"
    "${CMAKE_SOURCE_DIR}/csrc/bindings/ops_cuda_paged.cpp")

# attnforge_cuda_library(<name>): bindings and kernels, one part per dtype.
function(attnforge_cuda_library name)
  add_library(${name} SHARED ${cuda_once} ${cuda_bindings})
  foreach(dtype IN LISTS cuda_dtypes)
    add_library(${name}_${dtype} OBJECT ${cuda_per_dtype})
    target_compile_definitions(${name}_${dtype} PRIVATE ATTNFORGE_DTYPE=${dtype})
    target_include_directories(${name}_${dtype} PRIVATE
                               "${CMAKE_SOURCE_DIR}/csrc" "${CMAKE_SOURCE_DIR}/csrc/include")
    target_link_libraries(${name} PRIVATE ${name}_${dtype})
  endforeach()
  target_include_directories(${name} PRIVATE
                             "${CMAKE_SOURCE_DIR}/csrc" "${CMAKE_SOURCE_DIR}/csrc/include")
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
    list(TRANSFORM ATTNFORGE_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE cuda_code)
    list(GET ATTNFORGE_CUDA_ARCHS 0 cuda_first)
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
    attnforge_cuda_library(attnforge_cuda)
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
