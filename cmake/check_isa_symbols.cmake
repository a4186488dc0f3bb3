# cmake -DOBJECTS=a.o;b.o -DNM=nm -P check_isa_symbols.cmake
# Fails if an object defines a weak (W, V) or unique (u) symbol: code compiled for one instruction set
# that the linker might give to all of them.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" -C "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} defines symbols that are not internal:\n  ${weak}")
  endif()
endforeach()
