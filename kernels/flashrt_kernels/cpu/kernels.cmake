# add_kernels(TARGET OPTIONS...): adds the CPU kernels, compiled with OPTIONS, to a target.
#
# kernels.cpp is compiled once per instruction set, each into its own namespace; isa.cpp picks one at run time.

set(KERNELS_DIR ${CMAKE_CURRENT_LIST_DIR})

# Writes constants.h: the lines `NAME = number` of the Python files, as constants of the same name.
function(write_constants header)
  set(text "// Written by kernels.cmake from what Python says.\n#pragma once\n\nnamespace flashrt {\n\n")
  foreach(file ${ARGN})
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
    file(STRINGS ${file} lines REGEX "^[A-Z0-9_]+ = [0-9]+( |$)")
    foreach(line ${lines})
      if(line MATCHES "^([A-Z0-9_]+) = ([0-9]+)")
        string(APPEND text "constexpr int ${CMAKE_MATCH_1} = ${CMAKE_MATCH_2};\n")
      endif()
    endforeach()
  endforeach()
  file(CONFIGURE OUTPUT ${header} CONTENT "${text}\n}  // namespace flashrt\n" @ONLY)
endfunction()

set(CONSTANTS_DIR ${CMAKE_CURRENT_BINARY_DIR}/constants)
write_constants(${CONSTANTS_DIR}/constants.h
  ${KERNELS_DIR}/../limits.py ${KERNELS_DIR}/../rows.py ${KERNELS_DIR}/../channels.py ${KERNELS_DIR}/../labels.py)

function(add_kernels target)
  target_include_directories(${target} PRIVATE ${CONSTANTS_DIR})
  foreach(source pool isa linear glu glu_groups channels gemm attention attention_list labels select elementwise delta
          quantize stored)
    target_sources(${target} PRIVATE ${KERNELS_DIR}/${source}.cpp)
  endforeach()
  target_compile_options(${target} PRIVATE ${ARGN})

  function(add_isa name)
    add_library(${target}_${name} OBJECT ${KERNELS_DIR}/kernels.cpp)
    set_target_properties(${target}_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    target_compile_definitions(${target}_${name} PRIVATE FLASHRT_ISA=${name})
    target_include_directories(${target}_${name} PRIVATE ${CONSTANTS_DIR})
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
    add_isa(amx ${options} ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
  endif()
endfunction()
