# add_kernels(TARGET OPTIONS...): adds the CPU kernels, compiled with OPTIONS, to a target.
#
# kernels.cpp is compiled once per instruction set, each into its own namespace; isa.cpp picks one at run time.

set(KERNELS_DIR ${CMAKE_CURRENT_LIST_DIR})

function(add_kernels target)
  foreach(source pool isa linear glu channels gemm attention elementwise quantize)
    target_sources(${target} PRIVATE ${KERNELS_DIR}/${source}.cpp)
  endforeach()
  target_compile_options(${target} PRIVATE ${ARGN})

  function(add_isa name)
    add_library(${target}_${name} OBJECT ${KERNELS_DIR}/kernels.cpp)
    set_target_properties(${target}_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    target_compile_definitions(${target}_${name} PRIVATE FLASHRT_ISA=${name})
    # GCC warns about its own intrinsics headers.
    target_compile_options(${target}_${name} PRIVATE ${ARGN} -Wno-uninitialized -Wno-maybe-uninitialized)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${name}>)
  endfunction()

  set(options ${ARGN})
  add_isa(scalar ${options})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(avx2 -mavx2 -mfma -mf16c)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512)
    add_isa(avx2 ${options} ${avx2})
    add_isa(avx512 ${options} ${avx512})
    add_isa(avx512bf16 ${options} ${avx512} -mavx512bf16)
  endif()
endfunction()
