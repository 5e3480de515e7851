/** Time on the horizontal axis: where moments are on the screen, and how pointer and keys pick a range. */
import { useRef, useState } from "preact/hooks";
import type { Span } from "../state";

const TICK_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800];

/** Returns round moments of the range, about one for each 90 pixels. */
export function ticks(from: number, until: number, width: number): number[] {
  const room = Math.max(2, Math.floor(width / 90));
  const step = (TICK_SECONDS.find((seconds) => (until - from) / (seconds * 1e3) <= room) ?? 2_592_000) * 1e3;
  // Days start at midnight in the time zone of the reader.
  const zone = new Date(from).getTimezoneOffset() * 60e3;
  const list: number[] = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at < until; at += step) list.push(at);
  return list;
}

/** A range of time in steps, on a width in pixels. */
export interface Plot {
  step: number;
  length: number;
  /** Returns the start of the step with this moment. */
  binOf: (at: number) => number;
  x: (at: number) => number;
  /** Extends a range to whole steps, because a profile belongs to the step that counts it. */
  snap: (one: number, other: number) => Span;
}

export function makePlot({ from, until, start, step }: { from: number; until: number; start: number; step: number }, width: number): Plot {
  const length = Math.max(1, until - from);
  const binOf = (at: number) => start + Math.floor((at - start) / step) * step;
  return {
    step,
    length,
    binOf,
    x: (at) => ((Math.min(Math.max(at, from), until) - from) / length) * width,
    snap: (one, other) => {
      const [low, high] = one < other ? [one, other] : [other, one];
      return [Math.round(Math.max(from, binOf(low))), Math.round(Math.min(until, binOf(high) + step))];
    },
  };
}

export interface SpanProps {
  from: number;
  until: number;
  span: Span | undefined;
  onSpan: (span: Span | undefined) => void;
}

/** The cursor and the drag, with the handlers of keys and of the pointer that move them. `inset`: pixels left of the plot. */
export function useSpan({ from, until, span, onSpan }: SpanProps, { step, length, x, snap }: Plot, width: number, inset = 0) {
  const [cursor, setCursor] = useState<number>();
  const [drag, setDrag] = useState<[number, number]>();
  const anchor = useRef<number | undefined>(undefined);
  const timeAt = (event: PointerEvent & { currentTarget: HTMLElement }) => {
    const left = event.currentTarget.getBoundingClientRect().left + inset;
    return from + (Math.min(Math.max(event.clientX - left, 0), width) / Math.max(1, width)) * length;
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const here = cursor ?? (event.key === "ArrowLeft" ? until : from - step / 2);
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const next = Math.min(Math.max(here + (event.key === "ArrowLeft" ? -step : step), from), until - 1);
      setCursor(next);
      if (event.shiftKey) {
        anchor.current ??= Math.min(Math.max(here, from), until - 1);
        onSpan(snap(anchor.current, next));
      } else {
        anchor.current = undefined;
      }
    } else if (event.key === "Escape" && span) {
      anchor.current = undefined;
      onSpan(undefined);
    } else {
      return;
    }
    event.preventDefault();
  };
  const handlers = {
    onKeyDown,
    onBlur: () => setCursor(undefined),
    onPointerDown: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      if (event.button !== 0) return;
      event.currentTarget.setPointerCapture(event.pointerId);
      setDrag([timeAt(event), timeAt(event)]);
    },
    onPointerMove: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      setCursor(timeAt(event));
      if (drag) setDrag([drag[0], timeAt(event)]);
    },
    onPointerUp: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      if (!drag) return;
      const moved = Math.abs(x(drag[0]) - x(timeAt(event))) > 3;
      // A click without a drag clears the range.
      onSpan(moved ? snap(drag[0], timeAt(event)) : undefined);
      setDrag(undefined);
    },
    onPointerCancel: () => setDrag(undefined),
    onPointerLeave: () => setCursor(undefined),
  };
  return { cursor, picked: drag ? snap(...drag) : span, handlers };
}
