/** State of the flame graph: the drawn component, the zoomed path, the current frame, the search. */
import type { Chart } from "d3-flame-graph";
import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { useWidth } from "../parts/hooks";
import { type Found, type Look, type Node, createChart, decorate, drawnNodes, findKey, redraw, rootOf, sumMatches, zoomPath } from "./chart";
import { type FrameData, type Frames, matcher } from "./frames";

export interface FlameProps {
  frames: Frames;
  diff: boolean;
  dark: boolean;
  blind: boolean;
  flip: boolean;
  search: string;
  /** Key of the zoomed frame; empty for the root. */
  zoom: string;
  onZoom: (key: string) => void;
  onClear: () => void;
}

export interface FlameState {
  /** The element that the component draws into. */
  host: RefObject<HTMLDivElement | null>;
  /** The frames from the root to the zoomed one. */
  path: Node[];
  /** The frame that a key or a click has chosen. */
  picked: FrameData | undefined;
  hovered: FrameData | undefined;
  /** Sums of the matches while there is a search. */
  found: Found | undefined;
  patternError: string | undefined;
  /** Number of frames that are wide enough to be drawn. */
  shownCount: number;
  drawn: () => Node[];
  root: () => Node | undefined;
  /** Returns the current frame if it is drawn. */
  here: () => Node | undefined;
  pick: (node: Node | undefined) => void;
  /** Zooms to a frame and reports it to `onZoom`. */
  visit: (node: Node | undefined) => void;
}

const keyOf = (node: Node | undefined): string => (!node || node.depth === 0 ? "" : node.data.key);

export function useFlame(props: FlameProps): FlameState {
  const { frames, diff, dark, blind, flip, search, zoom } = props;
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const chart = useRef<Chart<FrameData> | undefined>(undefined);
  const pattern = useMemo(() => matcher(search), [search]);
  // Callbacks of the component outlive a render, so they read the latest properties from here.
  const latest = useRef<FlameProps & Look>({ ...props, matches: pattern.test });
  latest.current = { ...props, matches: pattern.test };
  const current = useRef<string>("");
  const [picked, setPicked] = useState<FrameData>();
  const [hovered, setHovered] = useState<FrameData>();
  const [path, setPath] = useState<Node[]>([]);
  const [found, setFound] = useState<Found>();
  const [shownCount, setShownCount] = useState(0);

  const root = () => rootOf(host.current);
  const drawn = () => drawnNodes(host.current);
  const mark = () => {
    const marked = decorate(host.current, latest.current, current.current);
    if (!marked) return;
    if (!marked.hasCurrent) current.current = "";
    setShownCount(marked.count);
  };
  const draw = (operation: (chart: Chart<FrameData>) => void) => {
    if (!chart.current) return;
    redraw(chart.current, host.current, operation);
    mark();
  };
  const readPath = () => {
    const top = root();
    if (top) setPath(zoomPath(top));
  };
  const zoomTo = (node: Node | undefined) => {
    if (!node) return;
    draw((drawing) => drawing.zoomTo(node));
    readPath();
  };

  // One component exists for the life of the element. The effects below pass data and options to it.
  useLayoutEffect(() => {
    const box = host.current;
    if (!box || width === 0 || chart.current) return;
    chart.current = createChart(box, width, () => latest.current, {
      onHover: (node) => setHovered(node?.data),
      onClick: (node) => {
        current.current = node.data.key;
        setPicked(node.data);
        setHovered(undefined);
        mark();
        readPath();
        latest.current.onZoom(keyOf(node));
      },
    });
  }, [width]);
  useEffect(() => () => void chart.current?.destroy(), []);

  const runSearch = () => {
    const { search: text } = latest.current;
    draw((drawing) => (text === "" ? drawing.clear() : drawing.search(text)));
    const top = root();
    setFound(text === "" || !top ? undefined : sumMatches(top));
  };

  // New data keeps the same frame zoomed and picked if it still exists.
  const shown = useRef<Frames | undefined>(undefined);
  useEffect(() => {
    if (!chart.current || width === 0) return;
    const isNew = shown.current !== frames;
    shown.current = frames;
    draw((drawing) => {
      drawing.width(width).inverted(!flip);
      drawing.update(isNew ? frames.root : undefined);
    });
    if (!isNew) return;
    if (search !== "") runSearch();
    const node = zoom === "" ? undefined : findKey(root(), zoom);
    if (node) zoomTo(node);
    else readPath();
    if (picked) setPicked(findKey(root(), picked.key)?.data);
  }, [frames, width, flip, dark, blind, diff]);

  useEffect(runSearch, [search]);

  // The address may change the zoom: the back button, or a link.
  useEffect(() => {
    const last = path[path.length - 1];
    if (!last || keyOf(last) === zoom) return;
    zoomTo((zoom === "" ? undefined : findKey(root(), zoom)) ?? root());
  }, [zoom]);

  return {
    host,
    path,
    picked,
    hovered,
    found: search === "" ? undefined : found,
    patternError: search === "" ? undefined : pattern.error,
    shownCount,
    drawn,
    root,
    here: () => drawn().find((node) => node.data.key === current.current),
    pick: (node) => {
      current.current = node?.data.key ?? "";
      setPicked(node?.data);
      mark();
      host.current?.querySelector("g.frame.current")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    },
    visit: (node) => {
      zoomTo(node);
      props.onZoom(keyOf(node));
    },
  };
}
