/** The flame graph: d3-flame-graph draws, zooms and searches; what is here adds the keyboard, names and colours. */
import flamegraph, { type Chart, type ChartNode, type Tip } from "d3-flame-graph";
import { select } from "d3-selection";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { type FrameData, type Frames, changeColour, groupColour, matchColour, matcher } from "./frames";
import { integer, points, share, value } from "../units";
import { useWidth } from "../parts";

type Node = ChartNode<FrameData>;

const ROW = 20;
/** Narrower frames are left out until one zooms in: nobody can see or hit them. */
const MIN_WIDTH = 1.2;
/** More frames than this on the screen change at once instead of gliding. */
const MAX_GLIDING = 400;

export interface FlameProps {
  frames: Frames;
  diff: boolean;
  dark: boolean;
  blind: boolean;
  flip: boolean;
  search: string;
  zoom: string;
  onZoom: (key: string) => void;
  onClear: () => void;
}

function label(frame: FrameData, { unit, total, baseTotal }: Frames, diff: boolean): string {
  const kind = frame.kernel ? ", kernel" : frame.inlined ? ", inlined" : "";
  if (!diff) {
    return `${frame.name}, ${share(frame.total, total)}, ${value(frame.total, unit)}, self ${value(frame.self, unit)}${kind}`;
  }
  return `${frame.name}, ${points(frame.delta)}: ${share(frame.baseTotal, baseTotal)} in the base, ${share(frame.total, total)} in the comparison${kind}`;
}

/** What the tooltip and the line below the graph say about a frame. */
function Facts({ frame, frames, diff }: { frame: FrameData; frames: Frames; diff: boolean }) {
  const { unit, total, baseTotal } = frames;
  const kind = [frame.kernel ? "kernel" : "", frame.inlined ? "inlined" : ""].filter(Boolean).join(", ");
  return (
    <>
      <div class="facts-name">{frame.name}</div>
      <div class="facts-file">
        {frame.file || (frame.special ? "not a function" : "no binary known")}
        {kind && ` · ${kind}`}
      </div>
      {diff ? (
        <table class="facts-table">
          <thead>
            <tr><td /><th>base</th><th>comparison</th><th>change</th></tr>
          </thead>
          <tbody>
            <tr>
              <th>total</th>
              <td>{value(frame.baseTotal, unit)} <span>{share(frame.baseTotal, baseTotal)}</span></td>
              <td>{value(frame.total, unit)} <span>{share(frame.total, total)}</span></td>
              <td>{points(frame.delta)}</td>
            </tr>
            <tr>
              <th>self</th>
              <td>{value(frame.baseSelf, unit)} <span>{share(frame.baseSelf, baseTotal)}</span></td>
              <td>{value(frame.self, unit)} <span>{share(frame.self, total)}</span></td>
              <td>{points((total > 0 ? frame.self / total : 0) - (baseTotal > 0 ? frame.baseSelf / baseTotal : 0))}</td>
            </tr>
          </tbody>
        </table>
      ) : (
        <dl class="facts-values">
          <div><dt>total</dt><dd>{value(frame.total, unit)}</dd><dd class="dim">{share(frame.total, total)}</dd></div>
          <div><dt>self</dt><dd>{value(frame.self, unit)}</dd><dd class="dim">{share(frame.self, total)}</dd></div>
        </dl>
      )}
    </>
  );
}

export function Flame(props: FlameProps) {
  const { frames, diff, dark, blind, flip, search, zoom } = props;
  const host = useRef<HTMLDivElement>(null);
  const tipBox = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const chart = useRef<Chart<FrameData> | undefined>(undefined);
  const latest = useRef(props);
  latest.current = props;
  const current = useRef<string>("");
  const [picked, setPicked] = useState<FrameData>();
  const [hovered, setHovered] = useState<FrameData>();
  const [path, setPath] = useState<Node[]>([]);
  const [found, setFound] = useState<{ part: number; base: number; count: number }>();
  const [shownCount, setShownCount] = useState(0);
  const pattern = useMemo(() => matcher(search), [search]);
  const patternNow = useRef(pattern);
  patternNow.current = pattern;

  const root = (): Node | undefined => (host.current as (HTMLDivElement & { __data__?: Node }) | null)?.__data__;
  const svg = () => host.current?.querySelector("svg");
  const drawn = (): Node[] =>
    [...(host.current?.querySelectorAll<SVGGElement & { __data__: Node }>("g.frame") ?? [])].map((g) => g.__data__);

  const findKey = (key: string): Node | undefined => {
    const open = [root()];
    for (let node = open.pop(); node; node = open.pop()) {
      if (node.data.key === key) return node;
      open.push(...(node.children ?? []));
    }
    return undefined;
  };

  /** Tells assistive technology, and the style sheet, what the component's groups are. */
  const decorate = () => {
    const now = latest.current;
    const box = svg();
    if (!box) return;
    box.setAttribute("aria-hidden", "true");
    const searching = now.search !== "";
    let active: Node | undefined;
    for (const g of box.querySelectorAll<SVGGElement & { __data__: Node }>("g.frame")) {
      const node = g.__data__;
      const { data } = node;
      g.classList.toggle("special", data.special && node.depth > 0);
      g.classList.toggle("inlined", data.inlined);
      g.classList.toggle("kernel", data.kernel);
      g.classList.toggle("match", searching && Boolean(node.highlight));
      g.classList.toggle("miss", searching && !node.highlight);
      g.classList.toggle("more", now.diff && data.delta >= 0.001);
      g.classList.toggle("less", now.diff && data.delta <= -0.001);
      const isCurrent = data.key === current.current;
      g.classList.toggle("current", isCurrent);
      if (isCurrent) active = node;
    }
    // The outline of the current frame must not be painted over by its neighbours.
    const front = box.querySelector("g.frame.current");
    if (front) box.append(front);
    if (!active) current.current = "";
    setShownCount(box.querySelectorAll("g.frame").length);
  };

  const draw = (operation: (chart: Chart<FrameData>) => void) => {
    if (!chart.current) return;
    const gliding = !matchMedia("(prefers-reduced-motion: reduce)").matches && drawn().length < MAX_GLIDING;
    chart.current.transitionDuration(gliding ? 180 : 0);
    operation(chart.current);
    decorate();
  };

  const pick = (node: Node | undefined) => {
    current.current = node?.data.key ?? "";
    setPicked(node?.data);
    decorate();
    const g = host.current?.querySelector("g.frame.current");
    g?.scrollIntoView({ block: "nearest", inline: "nearest" });
  };

  const readPath = () => {
    let node: Node | undefined | null = root();
    if (!node) return;
    // The zoomed frame is the last one that was faded for its ancestors' sake, or the root.
    const steps: Node[] = [node];
    for (;;) {
      const inner: Node | undefined = node?.data.fade ? node.children?.find((child) => !child.data.hide) : undefined;
      if (!inner) break;
      steps.push(inner);
      node = inner;
    }
    setPath(steps);
  };

  const zoomTo = (node: Node | undefined) => {
    if (!node) return;
    draw((drawing) => drawing.zoomTo(node));
    readPath();
  };

  // One component for the life of this element; data and options are handed to it below.
  useLayoutEffect(() => {
    const box = host.current;
    if (!box || width === 0 || chart.current) return;
    const tip: Tip<FrameData> = Object.assign(() => {}, {
      show: (_event: MouseEvent, node: Node) => setHovered(node.data),
      hide: () => setHovered(undefined),
      destroy: () => {},
    });
    const made = flamegraph<FrameData>()
      .width(width)
      .cellHeight(ROW)
      .minFrameSize(MIN_WIDTH)
      .transitionDuration(0)
      .inverted(!latest.current.flip)
      .resetHeightOnZoom(true)
      .sort((a, b) => b.data.value - a.data.value || (a.data.name < b.data.name ? -1 : 1))
      .title("")
      .tooltip(tip)
      .getName((node) =>
        latest.current.diff && Math.abs(node.data.delta) >= 0.001
          ? `${node.data.name} (${points(node.data.delta)})`
          : node.data.name,
      )
      .getValue((data) => data.value)
      .setSearchMatch((node) => !(node.depth === 0) && patternNow.current.test(node.data.name))
      .setSearchHandler(() => {})
      .setDetailsHandler(() => {})
      .setColorMapper(({ data, highlight }) => {
        const now = latest.current;
        if (highlight && now.search !== "" && !now.diff) return matchColour(now.dark);
        return now.diff ? changeColour(data.delta, now.dark, now.blind) : groupColour(now.frames.hues, data.group, now.dark, data.name);
      })
      .onClick((node) => {
        current.current = node.data.key;
        setPicked(node.data);
        setHovered(undefined);
        decorate();
        readPath();
        latest.current.onZoom(node.depth === 0 ? "" : node.data.key);
      });
    chart.current = made;
    // The component keeps its data on the element, as d3 does.
    made(select(box).datum({ ...latest.current.frames.root, children: [] }));
    return undefined;
  }, [width]);

  useEffect(() => () => void chart.current?.destroy(), []);

  const runSearch = () => {
    draw((drawing) => {
      if (latest.current.search === "") drawing.clear();
      else drawing.search(latest.current.search);
    });
    const top = root();
    if (latest.current.search === "" || !top) {
      setFound(undefined);
      return;
    }
    const sum = { part: 0, base: 0, count: 0 };
    const open: [Node, boolean][] = [[top, false]];
    for (let next = open.pop(); next; next = open.pop()) {
      const [node, inside] = next;
      if (node.highlight) sum.count += 1;
      if (node.highlight && !inside) {
        sum.part += node.data.total;
        sum.base += node.data.baseTotal;
      }
      for (const child of node.children ?? []) open.push([child, inside || Boolean(node.highlight)]);
    }
    setFound(sum);
  };

  // New data: the same frame stays zoomed and picked where it is still there.
  const shown = useRef<Frames | undefined>(undefined);
  useEffect(() => {
    if (!chart.current || width === 0) return;
    const isNew = shown.current !== frames;
    shown.current = frames;
    draw((drawing) => {
      drawing.width(width).inverted(!flip);
      drawing.update(isNew ? frames.root : undefined);
    });
    if (isNew) {
      if (search !== "") runSearch();
      const node = zoom === "" ? undefined : findKey(zoom);
      if (node) zoomTo(node);
      else readPath();
      if (picked) setPicked(findKey(picked.key)?.data);
    }
  }, [frames, width, flip, dark, blind, diff]);

  useEffect(runSearch, [search]);

  // A change of the zoom from outside: the back button, a link.
  useEffect(() => {
    const last = path[path.length - 1];
    if (!last || (last.depth === 0 ? "" : last.data.key) === zoom) return;
    zoomTo((zoom === "" ? undefined : findKey(zoom)) ?? root());
  }, [zoom]);

  const visit = (node: Node | undefined) => {
    zoomTo(node);
    props.onZoom(!node || node.depth === 0 ? "" : node.data.key);
  };

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const list = drawn();
    const here = list.find((node) => node.data.key === current.current);
    const row = (depth: number) => list.filter((node) => node.depth === depth).sort((a, b) => a.x0 - b.x0);
    const child = () => {
      const inside = row((here?.depth ?? -1) + 1).filter((node) => node.parent === here);
      return inside.reduce<Node | undefined>((best, node) => (!best || node.x1 - node.x0 > best.x1 - best.x0 ? node : best), undefined);
    };
    const beside = (step: number) => {
      const siblings = here ? row(here.depth) : [];
      return siblings[siblings.findIndex((node) => node === here) + step];
    };
    const match = (step: number) => {
      const hits = list.filter((node) => node.highlight).sort((a, b) => a.depth - b.depth || a.x0 - b.x0);
      if (hits.length === 0) return undefined;
      const at = hits.findIndex((node) => node === here);
      return hits[at < 0 ? (step > 0 ? 0 : hits.length - 1) : (at + step + hits.length) % hits.length];
    };
    let next: Node | undefined;
    switch (event.key) {
      case flip ? "ArrowUp" : "ArrowDown":
        next = here ? child() : list.find((node) => node.depth === 0);
        break;
      case flip ? "ArrowDown" : "ArrowUp":
        next = here?.parent ?? undefined;
        break;
      case "ArrowLeft":
        next = beside(-1);
        break;
      case "ArrowRight":
        next = beside(1);
        break;
      case "Home":
        next = list.find((node) => node.depth === 0);
        break;
      case "n":
        next = match(1);
        break;
      case "N":
        next = match(-1);
        break;
      case "Enter":
      case " ":
        if (here) visit(here);
        break;
      case "Backspace":
        visit(path[path.length - 2]);
        break;
      case "Escape":
        if (path.length > 1) visit(root());
        else if (search !== "") props.onClear();
        else pick(undefined);
        break;
      default:
        return;
    }
    event.preventDefault();
    if (next) pick(next);
  };

  const onPointer = (event: PointerEvent) => {
    const box = tipBox.current;
    if (!box) return;
    const { offsetWidth, offsetHeight } = box;
    const left = Math.min(event.clientX + 14, innerWidth - offsetWidth - 8);
    const top = event.clientY + 18 + offsetHeight > innerHeight ? event.clientY - offsetHeight - 10 : event.clientY + 18;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${Math.max(8, top)}px`;
  };

  const zoomed = path.length > 1;
  // A deep path says where it starts and where it ends.
  const crumbs = path.length > 6 ? [path[0], undefined, ...path.slice(-4)] : path;
  const inSearch = found && search !== "";
  return (
    <div class={`flame${diff ? " diff" : ""}${flip ? "" : " down"}`}>
      <div class="flame-head">
        <nav class="crumbs" aria-label="Zoomed frame">
          <ol>
            {crumbs.map((node, at) =>
              node ? (
                <li key={node.data.key}>
                  <button type="button" onClick={() => visit(node)} aria-current={at === crumbs.length - 1 ? "true" : undefined} title={node.data.name}>
                    {node.depth === 0 ? "all" : node.data.name}
                  </button>
                </li>
              ) : (
                <li key="gap" class="gap">…</li>
              ),
            )}
          </ol>
          {zoomed && (
            <button type="button" class="quiet" onClick={() => visit(root())}>
              Reset zoom <kbd>Esc</kbd>
            </button>
          )}
        </nav>
        <div class="found" role="status">
          {pattern.error !== undefined && search !== "" && <span class="bad">{pattern.error}</span>}
          {!inSearch && shownCount < frames.count && !zoomed && (
            <span>{integer(shownCount)} of {integer(frames.count)} frames are wide enough to see; zoom in for the others</span>
          )}
          {inSearch && pattern.error === undefined && (
            found.count === 0 ? (
              <span>No frame matches</span>
            ) : (
              <span>
                <b>{found.count}</b> {found.count === 1 ? "frame" : "frames"} · <b>{share(found.part, frames.total)}</b>
                {diff && <> (base {share(found.base, frames.baseTotal)})</>} matched
              </span>
            )
          )}
        </div>
      </div>
      <div
        class="flame-graph"
        tabIndex={0}
        role="application"
        aria-roledescription="flame graph"
        aria-label={`Flame graph of ${frames.count} frames. Arrow keys move, Enter zooms in, Escape resets, slash searches, n goes to the next match.`}
        aria-describedby="picked-frame"
        ref={host}
        onKeyDown={onKeyDown}
        onPointerMove={onPointer}
      />
      <div class="picked" id="picked-frame">
        {picked ? (
          <>
            <div class="picked-facts"><Facts frame={picked} frames={frames} diff={diff} /></div>
            <button type="button" class="quiet" onClick={() => void navigator.clipboard?.writeText(picked.name)}>Copy name</button>
          </>
        ) : (
          <span class="dim hint">
            <kbd>↑</kbd> <kbd>↓</kbd> <kbd>←</kbd> <kbd>→</kbd> move · <kbd>Enter</kbd> or click zooms · <kbd>Esc</kbd> resets · <kbd>/</kbd> searches
          </span>
        )}
      </div>
      <div class="visually-hidden" role="status">{picked ? label(picked, frames, diff) : ""}</div>
      <div class={`tip${hovered ? " on" : ""}`} ref={tipBox} aria-hidden="true">
        {hovered && <Facts frame={hovered} frames={frames} diff={diff} />}
      </div>
    </div>
  );
}
