-module(spin).
-export([main/0]).

main() ->
    io:format("ready~n"),
    loop(0).

loop(Sum) -> loop(Sum + outer(200000)).

outer(Count) -> inner(Count, 0) + 1.

inner(0, Sum) -> Sum;
inner(Count, Sum) -> inner(Count - 1, (Sum bxor Count) band 16#ffffff).
