/** The selections that the address asks for: the window on the timeline, the picked part of it, and the base. */
import { useMemo } from "preact/hooks";
import type { Selection } from "../api";
import type { Span, State } from "../state";
import { resolve } from "../time";

/** Changes of the address that replace all profiles, so that picked ranges and a single profile no longer apply. */
export const OTHER_PROFILES: Partial<State> = { span: undefined, bspan: undefined, profile: "" };

export interface Selections {
  /** True if the range in the address is not valid; the others then use the last hour. */
  badTime: boolean;
  /** The range on the timeline, and the same for the base. */
  window: Selection;
  baseWindow: Selection;
  /** The picked parts of both ranges, if any. */
  span: Span | undefined;
  bspan: Span | undefined;
  /** The profiles to show. */
  selection: Selection;
  /** The profiles to compare with, in a comparison. */
  base: Selection | undefined;
}

/** Resolves the range in the address once for each `tick`, so that all requests have the same `now`. */
function useRange({ from, until }: State, tick: number): { from: number; until: number; badTime: boolean } {
  return useMemo(() => {
    const now = Date.now();
    const [low, high] = [resolve(from, now), resolve(until, now)];
    if (low === undefined || high === undefined || low >= high) return { from: now - 3600e3, until: now, badTime: true };
    return { from: low, until: high, badTime: false };
  }, [from, until, tick]);
}

export function useSelections(state: State, tick: number): Selections {
  const { from, until, badTime } = useRange(state, tick);
  const window: Selection = { query: state.q, from, until };
  const half = from + Math.floor((until - from) / 2);
  // By default a comparison of one series compares the two halves of the window, and one of two series the whole window.
  const sameSeries = state.bq === undefined && state.shift === 0;
  const baseWindow: Selection = { query: state.bq ?? state.q, from: from - state.shift, until: until - state.shift };
  const span: Span | undefined = state.span ?? (state.compare && sameSeries ? [half, until] : undefined);
  const bspan: Span | undefined = state.bspan ?? (sameSeries ? [from, half] : undefined);
  const selection: Selection = span ? { query: state.q, from: span[0], until: span[1] } : window;
  const base: Selection | undefined = state.compare ? (bspan ? { ...baseWindow, from: bspan[0], until: bspan[1] } : baseWindow) : undefined;
  return { badTime, window, baseWindow, span, bspan, selection, base };
}
