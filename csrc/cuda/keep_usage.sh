# Compiles as it is told, and keeps what ptxas reports of the kernels beside the object, which is named last.
for object in "$@"; do :; done
"$@" 2> "$object.usage"
status=$?
sed -e '/^ptxas info/d' -e '/^ *[0-9]* bytes stack frame/d' "$object.usage" >&2
exit $status
