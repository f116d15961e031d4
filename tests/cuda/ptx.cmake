# What nvcc made of the kernels, for ptx_interpreter: the library of operators, which then serves CPU tensors, with a
# stand-in for the CUDA runtime, and the Python module. `cmake --build FOLDER --target ptx`.
set(STAND_IN ${CMAKE_SOURCE_DIR}/ptx_interpreter/host)

add_library(ptx_runtime OBJECT EXCLUDE_FROM_ALL ${STAND_IN}/cudart.cpp)
target_link_libraries(ptx_runtime PRIVATE CUDA::toolkit)
target_compile_options(ptx_runtime PRIVATE -Wall -Wextra)
set(PTX_OBJECTS $<TARGET_OBJECTS:cuda_kernels> $<TARGET_OBJECTS:ptx_runtime>)

add_library(ptx_ops SHARED EXCLUDE_FROM_ALL ${GPU_BINDINGS} csrc/cpu/isa.cpp ${CMAKE_CURRENT_LIST_DIR}/interpreted.cpp
                                            ${CMAKE_CURRENT_LIST_DIR}/torch_stand_in.cpp ${PTX_OBJECTS})
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/torch_stand_in.cpp PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
compile_with_torch(ptx_ops)
link_with_torch(ptx_ops)
target_compile_definitions(ptx_ops PRIVATE EVAKERNELS_CUDA EVAKERNELS_INTERPRETED)
set_target_properties(ptx_ops PROPERTIES OUTPUT_NAME _ops LIBRARY_OUTPUT_DIRECTORY ptx LINKER_LANGUAGE CXX)

add_python_module(ptx_module)
target_link_libraries(ptx_module PRIVATE ptx_ops)
set_target_properties(ptx_module PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY ptx INSTALL_RPATH "$ORIGIN"
                                            EXCLUDE_FROM_ALL ON)

add_custom_target(ptx DEPENDS ptx_ops ptx_module)
