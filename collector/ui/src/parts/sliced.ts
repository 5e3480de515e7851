/** Long computations in slices: between two slices the browser handles input and draws. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";

/** A computation that yields wherever it may pause. */
export type Sliced<T> = Generator<undefined, T>;

/** Milliseconds of one slice. A browser shows 60 frames a second, so half of a frame stays for input and drawing. */
const SLICE_MS = 8;

/** Runs one slice. Returns the result, or `undefined` if there is more to do. */
function slice<T>(work: Sliced<T>): { value: T } | undefined {
  const until = performance.now() + SLICE_MS;
  for (;;) {
    const step = work.next();
    if (step.done) return { value: step.value };
    if (performance.now() >= until) return undefined;
  }
}

/**
 * Returns the result of the computation that `make` starts after each change of `inputs`, and the former result until then.
 * A computation of one slice ends within the same paint, so that small graphs do not flicker.
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
    let timer: ReturnType<typeof setTimeout> | undefined;
    const next = () => {
      const done = slice(work);
      if (done) set({ value: done.value, busy: false });
      else timer = setTimeout(next);
    };
    const first = slice(work);
    if (first) {
      set({ value: first.value, busy: false });
      return;
    }
    set((before) => ({ ...before, busy: true }));
    timer = setTimeout(next);
    return () => clearTimeout(timer);
  }, inputs);
  return state;
}
