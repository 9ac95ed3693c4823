# Digests of the kernels' sources, which results of tuning hold for: one per kernel, over its file,
# the headers that it includes directly or not, and how it is compiled. Taken at configure time;
# setup.py configures at each build.

# attnforge_included(<file> <sources> <variable>): the headers below the folder `sources` that
# `file` includes, directly or not, sorted. Conditions of the preprocessor are not looked at: what
# may be included counts.
#
# kernels.h is left out. It declares the entry points of all families, so that it changes with every
# new kernel, and no code of a kernel comes from it: a kernel reaches the headers it is made of by
# its other includes.
function(attnforge_included file sources variable)
  set(found "")
  set(left "${file}")
  while(left)
    list(POP_FRONT left current)
    file(STRINGS "${current}" lines REGEX "^[ \t]*#[ \t]*include[ \t]*\"")
    get_filename_component(beside "${current}" DIRECTORY)
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^[^\"]*\"([^\"]*)\".*" "\\1" name "${line}")
      unset(path)
      foreach(folder IN ITEMS "${beside}" "${sources}" "${sources}/include")
        if(NOT path AND EXISTS "${folder}/${name}")
          set(path "${folder}/${name}")
        endif()
      endforeach()
      list(FIND found "${path}" known)
      if(path AND known LESS 0 AND NOT name STREQUAL "cpu/kernels.h")
        list(APPEND found "${path}")
        list(APPEND left "${path}")
      endif()
    endforeach()
  endwhile()
  list(SORT found)
  set(${variable} "${found}" PARENT_SCOPE)
endfunction()

# attnforge_digest(<file> <sources> <flags> <variable>): 16 hexadecimal digits.
function(attnforge_digest file sources flags variable)
  set(text "${flags}")
  attnforge_included("${file}" "${sources}" headers)
  foreach(path IN LISTS headers ITEMS "${file}")
    file(SHA256 "${path}" digest)
    string(APPEND text "${digest}")
  endforeach()
  string(SHA256 digest "${text}")
  string(SUBSTRING "${digest}" 0 16 digest)
  set(${variable} "${digest}" PARENT_SCOPE)
endfunction()
