using System;
using System.Runtime.CompilerServices;

class Spin {
  [MethodImpl(MethodImplOptions.NoInlining)]
  static long Inner(long count) {
    long sum = 0;
    for (long i = 0; i < count; i++) sum += i ^ (sum >> 3);
    return sum;
  }

  [MethodImpl(MethodImplOptions.NoInlining)]
  static long Outer(long count) { return Inner(count) + 1; }

  static void Main() {
    Console.WriteLine("ready");
    for (long sum = 0;;) sum += Outer(1000000);
  }
}
