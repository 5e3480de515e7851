// Prints the number of cases, then its own stack in each, `CASE;CLASS.METHOD LINE;...` leaf first, and spins there.
import java.util.List;
import java.util.function.IntUnaryOperator;

public class Spin {
    static volatile long sink;
    static String printing;

    static void stack(String name) {
        if (!name.equals(printing)) return;
        printing = null;
        StringBuilder line = new StringBuilder(name);
        StackTraceElement[] frames = new Throwable().getStackTrace();
        for (int i = 1; i < frames.length; i++) {
            line.append(';').append(frames[i].getClassName()).append('.').append(frames[i].getMethodName());
            line.append(' ').append(frames[i].getLineNumber());
        }
        System.out.println(line);
    }

    static void spin(String name) {
        stack(name);
        long end = System.nanoTime() + 20_000_000;
        while (System.nanoTime() < end) burn();
    }

    static void burn() {
        long sum = 0;
        for (int i = 0; i < 20_000; i++) sum += i ^ sum >>> 3;
        sink = sum;
    }

    static void plain() {
        spin("plain");
    }

    static void lambda() {
        IntUnaryOperator add = n -> {
            spin("lambda");
            return n + 1;
        };
        sink = add.applyAsInt(1);
    }

    static void recursion(int depth) {
        if (depth == 0) spin("recursion");
        else recursion(depth - 1);
    }

    interface Shape {
        void draw();
    }

    static class Circle implements Shape {
        public void draw() {
            spin("virtual");
        }
    }

    static class Square implements Shape {
        public void draw() {
            new Circle().draw();
        }
    }

    static void callback() {
        List.of(1).forEach(n -> spin("callback"));
    }

    static synchronized void locked(long a, int b, Object c, double d, long e, long f, long g, long h) {
        spin("locked");
        sink = a + b + e + f + g + h;
    }

    static void thrown() {
        try {
            throw new IllegalStateException();
        } catch (IllegalStateException e) {
            spin("thrown");
        }
    }

    static void thread() throws Exception {
        Thread thread = new Thread(() -> spin("thread"));
        thread.start();
        thread.join();
    }

    // From 21 on. Called by reflection, so that older compilers build this file.
    static void virtual(String name, boolean waits) throws Exception {
        Runnable body = () -> {
            // Afterwards it runs from a copy of its frames.
            if (waits) sleep();
            spin(name);
        };
        ((Thread) Thread.class.getMethod("startVirtualThread", Runnable.class).invoke(null, body)).join();
    }

    static void sleep() {
        try {
            Thread.sleep(1);
        } catch (InterruptedException e) {
            throw new IllegalStateException(e);
        }
    }

    static final boolean HAS_VIRTUAL = Runtime.version().feature() >= 21;

    static void all(String print) throws Exception {
        printing = print;
        plain();
        lambda();
        recursion(40);
        new Square().draw();
        callback();
        locked(1, 2, "", 3, 4, 5, 6, 7);
        thrown();
        thread();
        if (HAS_VIRTUAL) {
            virtual("virtual thread", false);
            virtual("virtual thread that waited", true);
        }
    }

    public static void main(String[] args) throws Exception {
        System.out.println(HAS_VIRTUAL ? 10 : 8);
        // The stacks are printed when the code is compiled as far as it will be, and by the same line that runs later.
        String[] names = {
            "plain", "lambda", "recursion", "virtual", "callback", "locked", "thrown", "thread", "virtual thread",
            "virtual thread that waited"
        };
        for (int i = -Integer.parseInt(args[0]);; i++) {
            if (i == names.length) System.out.println("ready");
            all(i >= 0 && i < names.length ? names[i] : null);
        }
    }
}
