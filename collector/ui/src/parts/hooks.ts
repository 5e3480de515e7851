/** Hooks that several views use: the width of an element, answers of the collector, a timer, typed text, keys of the page. */
import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { ApiError } from "../api";

/** Returns the inner width of an element and follows its changes. */
export function useWidth(element: RefObject<HTMLElement | null>): number {
  const [width, set] = useState(0);
  useLayoutEffect(() => {
    if (!element.current) return;
    const observer = new ResizeObserver(([entry]) => set(Math.floor(entry?.contentRect.width ?? 0)));
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return width;
}

export interface Load<T> {
  data?: T;
  error?: ApiError;
  loading: boolean;
}

/** Calls `load` after each change of `key` and keeps the previous answer until the new one arrives. Without a key it loads nothing. */
export function useLoad<T>(key: string | undefined, load: (signal: AbortSignal) => Promise<T>): Load<T> {
  const [state, set] = useState<Load<T>>({ loading: key !== undefined });
  useEffect(() => {
    if (key === undefined) {
      set({ loading: false });
      return;
    }
    const abort = new AbortController();
    set((before) => ({ ...before, loading: true }));
    load(abort.signal).then(
      (data) => abort.signal.aborted || set({ data, loading: false }),
      (error: unknown) => {
        if (abort.signal.aborted) return;
        set({ error: error instanceof ApiError ? error : new ApiError(String(error), 0), loading: false });
      },
    );
    return () => abort.abort();
  }, [key]);
  return state;
}

/** Counts up every `seconds` while `on` and while the page is visible. The returned function counts up at once. */
export function useTick(on: boolean, seconds: number): [number, () => void] {
  const [tick, set] = useState(0);
  useEffect(() => {
    if (!on) return;
    const timer = setInterval(() => document.hidden || set((before) => before + 1), seconds * 1000);
    return () => clearInterval(timer);
  }, [on, seconds]);
  return [tick, () => set((before) => before + 1)];
}

/** Returns the text of a field, of which `apply` learns `wait` milliseconds after the last key. A new `value` replaces it. */
export function useTyped(value: string, wait: number, apply: (text: string) => void): [string, (text: string) => void] {
  const [typed, setTyped] = useState(value);
  // Before the next key: an effect after the paint would undo it.
  useLayoutEffect(() => setTyped(value), [value]);
  useLayoutEffect(() => {
    if (typed === value) return;
    const timer = setTimeout(() => apply(typed), wait);
    return () => clearTimeout(timer);
  }, [typed]);
  return [typed, setTyped];
}

/** Returns true if a key is part of a text or of a dialog, or a command of the browser. */
const isTaken = ({ ctrlKey, metaKey, altKey, target }: KeyboardEvent): boolean =>
  ctrlKey || metaKey || altKey || document.querySelector("dialog[open]") !== null || (target instanceof Element && target.closest("input:not([type=checkbox]), select, textarea") !== null);

/** Calls `run` when the reader presses this key anywhere on the page where it is not text. */
export function usePageKey(key: string | undefined, run: () => void): void {
  const last = useRef(run);
  last.current = run;
  useLayoutEffect(() => {
    if (key === undefined) return;
    const onKey = (event: KeyboardEvent) => {
      if (event.key !== key || isTaken(event)) return;
      event.preventDefault();
      last.current();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [key]);
}
