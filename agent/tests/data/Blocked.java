// Blocks in several ways. In its first rounds it prints its own stack in each, `CASE;CLASS.METHOD LINE;...` leaf first, by the line that
// blocks.
import java.util.concurrent.locks.LockSupport;

public class Blocked {
    static final Object LOCK = new Object();
    static final Object NEVER = new Object();
    static volatile int printed;

    static void print(String name) {
        if (printed > 1) return;
        StringBuilder line = new StringBuilder(name);
        StackTraceElement[] frames = new Throwable().getStackTrace();
        for (int i = 1; i < frames.length; i++) {
            line.append(';').append(frames[i].getClassName()).append('.').append(frames[i].getMethodName());
            line.append(' ').append(frames[i].getLineNumber());
        }
        System.out.println(line);
    }

    static void sleep() throws Exception {
        print("sleep"); Thread.sleep(30);
    }

    static void park() {
        print("park"); LockSupport.parkNanos(30_000_000);
    }

    static void await() throws Exception {
        synchronized (LOCK) {
            print("wait"); LOCK.wait(30);
        }
    }

    static void lock() throws Exception {
        Thread holder = new Thread(Blocked::hold);
        holder.start();
        while (!held) Thread.onSpinWait();
        print("lock"); synchronized (Blocked.class) { held = false; }
        holder.join();
        held = false;
    }

    static volatile boolean held;

    static synchronized void hold() {
        held = true;
        try {
            Thread.sleep(60);
        } catch (InterruptedException ignored) {
        }
    }

    static void deep(int depth) throws Exception {
        if (depth > 0) {
            deep(depth - 1);
        } else {
            print("deep"); Thread.sleep(30);
        }
    }

    static void never() {
        synchronized (NEVER) {
            try {
                print("never"); NEVER.wait();
            } catch (InterruptedException ignored) {
            }
        }
    }

    static void all() throws Exception {
        sleep();
        park();
        await();
        lock();
        deep(30);
    }

    public static void main(String[] arguments) throws Exception {
        for (;;) {
            all();
            if (printed++ == 1) {
                System.out.println("ready");
                // It waits for ever, from after the begin of the recording on.
                Thread.sleep(Long.parseLong(arguments[0]));
                Thread waiter = new Thread(Blocked::never);
                printed = 1;
                waiter.start();
                while (waiter.getState() != Thread.State.WAITING) Thread.sleep(1);
                printed = 2;
            }
        }
    }
}
