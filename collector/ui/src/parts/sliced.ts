/** Long computations in slices: between two slices the browser handles input and draws. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";

/** A computation that yields wherever it may pause. It continues at once, or after the promise that it yields. */
export type Sliced<T> = Generator<Promise<void> | undefined, T>;

/** Milliseconds of one slice. A browser shows 60 frames a second, so half of a frame stays for input and drawing. */
const SLICE_MS = 8;

/**
 * Returns the result of the computation that `make` starts after each change of `inputs`, and the former result until then.
 * A computation of one slice ends within the same paint, so that small graphs do not flicker. A change ends the former
 * computation, which can release what it holds in `finally`.
 */
export function useSliced<T>(make: () => Sliced<T> | undefined, inputs: unknown[]): { value: T | undefined; busy: boolean } {
  const [state, set] = useState<{ value: T | undefined; busy: boolean }>({ value: undefined, busy: true });
  const run = useRef(make);
  run.current = make;
  useLayoutEffect(() => {
    const work = run.current();
    if (!work) {
      set({ value: undefined, busy: false });
      return;
    }
    let ended = false;
    /** Runs one slice. Returns true if it was the last one. */
    const slice = (): boolean => {
      const until = performance.now() + SLICE_MS;
      while (!ended) {
        const step = work.next();
        if (step.done) {
          set({ value: step.value, busy: false });
          return true;
        }
        if (step.value) {
          void step.value.then(slice);
          return false;
        }
        if (performance.now() >= until) {
          setTimeout(slice);
          return false;
        }
      }
      return true;
    };
    if (!slice()) set((before) => ({ ...before, busy: true }));
    return () => {
      ended = true;
      work.return(undefined as never);
    };
  }, inputs);
  return state;
}
