# What nvcc made of the kernels, for ptx_interpreter: the library of operators, which then serves CPU tensors, and the
# program that drives the launchers, both with a stand-in for the CUDA runtime. `cmake --build FOLDER --target ptx`.
set(STAND_IN ${CMAKE_SOURCE_DIR}/ptx_interpreter/host)

add_library(ptx_runtime OBJECT EXCLUDE_FROM_ALL ${STAND_IN}/cudart.cpp)
target_link_libraries(ptx_runtime PRIVATE CUDA::toolkit)
target_compile_options(ptx_runtime PRIVATE -Wall -Wextra)
set(PTX_OBJECTS $<TARGET_OBJECTS:cuda_kernels> $<TARGET_OBJECTS:ptx_runtime>)

add_library(ptx_ops SHARED EXCLUDE_FROM_ALL ${GPU_BINDINGS} ${CMAKE_CURRENT_LIST_DIR}/interpreted.cpp
                                            ${CMAKE_CURRENT_LIST_DIR}/torch_stand_in.cpp ${PTX_OBJECTS})
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/torch_stand_in.cpp PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
compile_with_torch(ptx_ops)
link_with_torch(ptx_ops)
target_compile_definitions(ptx_ops PRIVATE EVAKERNELS_CUDA EVAKERNELS_INTERPRETED)
set_target_properties(ptx_ops PROPERTIES OUTPUT_NAME _ops LIBRARY_OUTPUT_DIRECTORY ptx LINKER_LANGUAGE CXX)

# The Python module on these kernels; of those for CPUs it has the names of the instruction sets alone.
add_python_module(ptx_module)
target_sources(ptx_module PRIVATE csrc/cpu/isa.cpp)
target_compile_definitions(ptx_module PRIVATE EVAKERNELS_CUDA EVAKERNELS_INTERPRETED)
target_link_libraries(ptx_module PRIVATE ptx_ops)
set_target_properties(ptx_module PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY ptx INSTALL_RPATH "$ORIGIN"
                                            EXCLUDE_FROM_ALL ON)

# A library, so that a Python program can serve its launches.
file(GLOB DRIVER_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/drive*.cpp)
add_library(ptx_drive MODULE EXCLUDE_FROM_ALL ${DRIVER_SOURCES} ${CMAKE_CURRENT_LIST_DIR}/cpu_memory.cpp ${PTX_OBJECTS})
target_include_directories(ptx_drive PRIVATE csrc)
target_compile_options(ptx_drive PRIVATE -Wall -Wextra -O1)
set_target_properties(ptx_drive PROPERTIES PREFIX "" OUTPUT_NAME drive LIBRARY_OUTPUT_DIRECTORY ptx LINKER_LANGUAGE CXX
                                           CXX_VISIBILITY_PRESET default)

add_custom_target(ptx DEPENDS ptx_ops ptx_module ptx_drive)
