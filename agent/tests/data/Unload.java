// Loads generations of classes, runs each class for some milliseconds, and has the virtual machine unload them. All names of a class
// have its number, and it runs below one of ten methods that stay: that of its generation's last digit.
import java.nio.charset.StandardCharsets;
import java.util.Arrays;

public class Unload {
    static final int CLASSES = 6;
    static final byte[] TEMPLATE_NUMBER = "00000".getBytes(StandardCharsets.ISO_8859_1);

    static class Loader extends ClassLoader {
        Runnable load(byte[] template, int number) throws Exception {
            byte[] bytes = template.clone();
            byte[] digits = String.format("%05d", number).getBytes(StandardCharsets.ISO_8859_1);
            for (int at = 0; at + 5 <= bytes.length; at++) {
                if (Arrays.equals(Arrays.copyOfRange(bytes, at, at + 5), TEMPLATE_NUMBER)) {
                    System.arraycopy(digits, 0, bytes, at, 5);
                }
            }
            String name = "Unload$Class" + new String(digits, StandardCharsets.ISO_8859_1);
            return (Runnable) defineClass(name, bytes, 0, bytes.length).getDeclaredConstructor().newInstance();
        }
    }

    public static class Class00000 implements Runnable {
        static long sink;

        public void run() {
            outer00000();
        }

        static void outer00000() {
            long end = System.nanoTime() + 9_000_000;
            while (System.nanoTime() < end) middle00000();
        }

        static void middle00000() {
            sink += leaf00000();
        }

        static long leaf00000() {
            long sum = 0;
            for (int i = 0; i < 3_000; i++) sum += i ^ sum >>> 3;
            return sum;
        }
    }

    static void generation0(Runnable code) { code.run(); }
    static void generation1(Runnable code) { code.run(); }
    static void generation2(Runnable code) { code.run(); }
    static void generation3(Runnable code) { code.run(); }
    static void generation4(Runnable code) { code.run(); }
    static void generation5(Runnable code) { code.run(); }
    static void generation6(Runnable code) { code.run(); }
    static void generation7(Runnable code) { code.run(); }
    static void generation8(Runnable code) { code.run(); }
    static void generation9(Runnable code) { code.run(); }

    static void run(int generation, Runnable code) {
        switch (generation % 10) {
            case 0: generation0(code); break;
            case 1: generation1(code); break;
            case 2: generation2(code); break;
            case 3: generation3(code); break;
            case 4: generation4(code); break;
            case 5: generation5(code); break;
            case 6: generation6(code); break;
            case 7: generation7(code); break;
            case 8: generation8(code); break;
            default: generation9(code);
        }
    }

    static void generation(int generation, byte[] template) throws Exception {
        Loader loader = new Loader();
        for (int number = 0; number < CLASSES; number++) {
            run(generation, loader.load(template, generation * 100 + number));
        }
    }

    public static void main(String[] arguments) throws Exception {
        byte[] template = Unload.class.getResourceAsStream("Unload$Class00000.class").readAllBytes();
        System.out.println("started");
        // 0 is the template's own number.
        for (int generation = 1; generation < 1000; generation++) {
            generation(generation, template);
            System.gc();
        }
    }
}
