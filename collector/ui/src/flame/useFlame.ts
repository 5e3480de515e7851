/** State of a flame graph: the drawn frames, the zoomed path, the current frame, the search. */
import type { ComponentChildren, RefObject } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { useWidth } from "../parts/hooks";
import { Drawing, type Group } from "./draw";
import type { FrameData, Frames } from "./frames";
import { type Found, type Node, layout, sumMatches } from "./layout";
import type { Matches } from "./matches";

export interface FlameProps {
  frames: Frames;
  dark: boolean;
  redGreen: boolean;
  flip: boolean;
  /** Which part of a sandwich view, or which side of a comparison, this graph is. */
  part?: "callers" | "callees" | "base" | "comparison";
  /** The heading of a part. */
  title?: ComponentChildren;
  /** The key of the current frame and its setter, if another graph shares them. */
  current?: string;
  onCurrent?: (key: string) => void;
  search: string;
  /** The names of the tree that match the search; `undefined` until they are known. */
  matches: Matches | undefined;
  /** Key of the zoomed frame; empty for the root. A key of another graph means the root too. */
  zoom: string;
  onZoom: (key: string) => void;
  onClear: () => void;
  /** Shows the callers and callees of a function. */
  onFunction: (frame: FrameData) => void;
}

export interface FlameState {
  /** The element that the frames are drawn into. */
  host: RefObject<HTMLDivElement | null>;
  /** The frames from the root to the zoomed one. */
  path: Node[];
  /** The frame that a key or a click has chosen. */
  picked: FrameData | undefined;
  hovered: FrameData | undefined;
  /** Sums of the matches while there is a search. */
  found: Found | undefined;
  /** The frames that are wide enough to be drawn. */
  nodes: Node[];
  /** Returns the current frame if it is drawn. */
  here: () => Node | undefined;
  pick: (node: Node | undefined) => void;
  /** Zooms to a frame. */
  visit: (node: Node | undefined) => void;
  handlers: {
    onClick: (event: MouseEvent) => void;
    onPointerOver: (event: PointerEvent) => void;
    onPointerLeave: () => void;
  };
}

const keyOf = (node: Node | undefined): string => (!node || node.depth === 0 ? "" : node.data.key);

/** Returns the frame under an event. */
function frameOf(event: Event): Node | undefined {
  const group = event.target instanceof Element ? event.target.closest<Group>("g.frame") : null;
  return group?.__data__;
}

export function useFlame(props: FlameProps): FlameState {
  const { frames, dark, redGreen, flip, zoom, onZoom, part } = props;
  const matches = props.matches?.matches;
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const drawing = useRef<Drawing | undefined>(undefined);
  const [ownCurrent, setOwnCurrent] = useState("");
  const current = props.current ?? ownCurrent;
  const setCurrent = props.onCurrent ?? setOwnCurrent;
  const [hovered, setHovered] = useState<FrameData>();

  const zoomed = useMemo(() => (zoom === "" ? 0 : Math.max(0, frames.find(zoom))), [frames, zoom]);
  const nodes = useMemo(() => {
    if (width === 0) return [];
    if (part !== "base" && part !== "comparison") return layout(frames, { zoom: zoomed, width, fraction: 1, value: frames.value, matches });
    // The side with the larger value fills the width, and the other one has the same scale.
    const at = (side: "base" | "comparison") => frames.side(side)[zoomed] as number;
    const fraction = at(part) / Math.max(at("base"), at("comparison"), Number.MIN_VALUE);
    return layout(frames, { zoom: zoomed, width, fraction, value: frames.side(part), matches });
  }, [frames, zoomed, width, matches, part]);
  const found = useMemo(() => (matches ? sumMatches(frames, matches) : undefined), [frames, matches]);
  const picked = useMemo(() => {
    const at = current === "" ? -1 : frames.find(current);
    return at < 0 ? undefined : frames.data(at);
  }, [frames, current]);

  useEffect(() => () => drawing.current?.destroy(), []);
  useLayoutEffect(() => {
    if (!host.current || nodes.length === 0) return;
    drawing.current ??= new Drawing(host.current, part ? `${part}-` : "");
    drawing.current.show(nodes, { frames, dark, redGreen, flip, searching: matches !== undefined, width }, current);
  }, [nodes, flip, dark, redGreen]);

  // At once, so that it cannot undo the mark of a later key.
  useLayoutEffect(() => drawing.current?.mark(current), [current]);

  const here = () => nodes.find((node) => node.data.key === current);
  const visit = (node: Node | undefined) => onZoom(keyOf(node));
  return {
    host,
    path: nodes.filter((node, at) => node.depth === at && (node.fade || node.index === zoomed)),
    picked,
    hovered,
    found,
    nodes,
    here,
    pick: (node) => {
      const key = node?.data.key ?? "";
      setCurrent(key);
      drawing.current?.mark(key);
      drawing.current?.scrollTo(key);
    },
    visit,
    handlers: {
      onClick: (event) => {
        const node = frameOf(event);
        if (!node) return;
        setCurrent(node.data.key);
        drawing.current?.mark(node.data.key);
        setHovered(undefined);
        visit(node);
      },
      onPointerOver: (event) => setHovered(frameOf(event)?.data),
      onPointerLeave: () => setHovered(undefined),
    },
  };
}
