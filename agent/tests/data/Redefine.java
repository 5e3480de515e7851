// Redefines the class that it runs, by an agent of its own, each time after some milliseconds. The first argument says how many. The
// class has ten chains of methods, `outer_N`, `middle_N` and `leaf_N`, of equal size. Each redefinition gives the code of each chain
// the names of the next one, so that methods come into the places of others. N is the same in all of a stack, with the method that
// called the chain.
import java.lang.instrument.ClassDefinition;
import java.lang.instrument.Instrumentation;
import java.nio.charset.StandardCharsets;

public class Redefine {
    static Instrumentation instrumentation;

    public static void premain(String arguments, Instrumentation given) {
        instrumentation = given;
    }

    public static class Work {
        static long sink;

        static void outer_0(long end) { while (System.nanoTime() < end) middle_0(); }
        static void middle_0() { sink += leaf_0(); }
        static long leaf_0() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_1(long end) { while (System.nanoTime() < end) middle_1(); }
        static void middle_1() { sink += leaf_1(); }
        static long leaf_1() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_2(long end) { while (System.nanoTime() < end) middle_2(); }
        static void middle_2() { sink += leaf_2(); }
        static long leaf_2() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_3(long end) { while (System.nanoTime() < end) middle_3(); }
        static void middle_3() { sink += leaf_3(); }
        static long leaf_3() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_4(long end) { while (System.nanoTime() < end) middle_4(); }
        static void middle_4() { sink += leaf_4(); }
        static long leaf_4() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_5(long end) { while (System.nanoTime() < end) middle_5(); }
        static void middle_5() { sink += leaf_5(); }
        static long leaf_5() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_6(long end) { while (System.nanoTime() < end) middle_6(); }
        static void middle_6() { sink += leaf_6(); }
        static long leaf_6() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_7(long end) { while (System.nanoTime() < end) middle_7(); }
        static void middle_7() { sink += leaf_7(); }
        static long leaf_7() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_8(long end) { while (System.nanoTime() < end) middle_8(); }
        static void middle_8() { sink += leaf_8(); }
        static long leaf_8() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }

        static void outer_9(long end) { while (System.nanoTime() < end) middle_9(); }
        static void middle_9() { sink += leaf_9(); }
        static long leaf_9() { long sum = 0; for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3; return sum; }
    }

    static void chain_0(long end) { Work.outer_0(end); }
    static void chain_1(long end) { Work.outer_1(end); }
    static void chain_2(long end) { Work.outer_2(end); }
    static void chain_3(long end) { Work.outer_3(end); }
    static void chain_4(long end) { Work.outer_4(end); }
    static void chain_5(long end) { Work.outer_5(end); }
    static void chain_6(long end) { Work.outer_6(end); }
    static void chain_7(long end) { Work.outer_7(end); }
    static void chain_8(long end) { Work.outer_8(end); }
    static void chain_9(long end) { Work.outer_9(end); }

    static void run(int chain, long end) {
        switch (chain) {
            case 0: chain_0(end); break;
            case 1: chain_1(end); break;
            case 2: chain_2(end); break;
            case 3: chain_3(end); break;
            case 4: chain_4(end); break;
            case 5: chain_5(end); break;
            case 6: chain_6(end); break;
            case 7: chain_7(end); break;
            case 8: chain_8(end); break;
            default: chain_9(end);
        }
    }

    // Gives each name the digit that is `steps` on. Names of the class and of what it calls have no such end.
    static byte[] renamed(byte[] template, int steps) {
        byte[] bytes = template.clone();
        for (String name : new String[] {"outer_", "middle_", "leaf_"}) {
            byte[] begin = name.getBytes(StandardCharsets.ISO_8859_1);
            for (int at = 0; at + begin.length < bytes.length; at++) {
                int digit = bytes[at + begin.length] - '0';
                boolean isName = digit >= 0 && digit <= 9;
                for (int i = 0; isName && i < begin.length; i++) isName = bytes[at + i] == begin[i];
                if (isName) bytes[at + begin.length] = (byte) ('0' + (digit + steps) % 10);
            }
        }
        return bytes;
    }

    static void redefine(byte[] template, int milliseconds) {
        try {
            for (int steps = 1; ; steps++) {
                Thread.sleep(milliseconds);
                instrumentation.redefineClasses(new ClassDefinition(Work.class, renamed(template, steps)));
            }
        } catch (Exception e) {
            e.printStackTrace();
            System.exit(1);
        }
    }

    public static void main(String[] arguments) throws Exception {
        byte[] template = Redefine.class.getResourceAsStream("Redefine$Work.class").readAllBytes();
        int milliseconds = Integer.parseInt(arguments[0]);
        if (milliseconds > 0) {
            Thread thread = new Thread(() -> redefine(template, milliseconds));
            thread.setDaemon(true);
            thread.start();
        }
        System.out.println("started");
        for (int chain = 0; ; chain = (chain + 1) % 10) run(chain, System.nanoTime() + 7_000_000);
    }
}
