# glibc 2.34 moved functions of libpthread, libdl and librt into libc, under new versions. The CUDA runtime calls them:
# linked with stand-ins that have the versions before, a library also runs with earlier releases.
function(link_with_older_glibc target)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libc.so.6 OUTPUT_VARIABLE libc
                  OUTPUT_STRIP_TRAILING_WHITESPACE)
  execute_process(COMMAND ${CMAKE_NM} -D ${libc} OUTPUT_VARIABLE symbols ERROR_QUIET)
  add_older_library(${target} pthread 0 "pthread_[a-z_]+|sem_[a-z]+" "${symbols}")
  add_older_library(${target} dl 2 "dl[a-z]+" "${symbols}")
  add_older_library(${target} rt 1 "shm_[a-z]+" "${symbols}")
endfunction()

# Links `target` with a library of the functions that match `pattern`, each under its last version before 2.34.
function(add_older_library target name version pattern symbols)
  string(REGEX MATCHALL " (${pattern})@@GLIBC_2\\.34" moved "${symbols}")
  if(NOT moved)
    return()
  endif()
  foreach(function ${moved})
    string(REGEX REPLACE "^ (.*)@@.*" "\\1" function ${function})
    string(REGEX MATCHALL " ${function}@GLIBC_[0-9.]+" older "${symbols}")
    list(SORT older COMPARE NATURAL)
    list(POP_BACK older last)
    string(REGEX REPLACE ".*@" "" last ${last})
    list(APPEND versions ${last})
    string(APPEND of_${last} "${function}; ")
    string(APPEND functions "void ${function}() {}\n")
  endforeach()
  list(REMOVE_DUPLICATES versions)
  foreach(last ${versions})
    string(APPEND map "${last} { ${of_${last}}};\n")
  endforeach()
  set(stem ${CMAKE_BINARY_DIR}/older_glibc/${name})  # not in a folder whose libraries a compiler may load
  file(WRITE ${stem}.cpp "extern \"C\" {\n${functions}}\n")
  file(WRITE ${stem}.map "${map}")
  add_library(older_${name} SHARED ${stem}.cpp)
  set_target_properties(older_${name} PROPERTIES OUTPUT_NAME ${name} SOVERSION ${version}
                                                 LIBRARY_OUTPUT_DIRECTORY older_glibc
                                                 CXX_VISIBILITY_PRESET default)
  target_link_options(older_${name} PRIVATE -nostdlib LINKER:--version-script=${stem}.map)
  target_link_libraries(${target} PRIVATE older_${name})
endfunction()
