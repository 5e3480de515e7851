/** The answers of the collector for the selections: sample types, timelines, the flame graph, the table of functions. */
import { useMemo } from "preact/hooks";
import {
  type ApiError,
  type FlameGraph,
  type Selection,
  type Series,
  type Timeline,
  type Top,
  baseParameters,
  get,
  selectionParameters,
} from "../api";
import { type Frames, frames } from "../flame/frames";
import { type Tree, fromGraph } from "../flame/tree";
import { type Load, useLoad } from "../parts/hooks";
import { type Sliced, useSliced } from "../parts/sliced";
import type { State } from "../state";
import { niceStep } from "../time";
import type { Selections } from "./selection";

const MAX_NODES = 100_000;
const MAX_FUNCTIONS = 2000;

/** Order of the known sample types in the menu; others follow by name. */
const TYPE_ORDER = ["cpu/nanoseconds", "samples/count", "offcpu/nanoseconds", "events/count"];

export interface Answers {
  types: string[];
  /** The shown sample type; empty until the types are known. */
  type: string;
  line: Timeline | undefined;
  baseLine: Timeline | undefined;
  graph: FlameGraph | undefined;
  /** The graph, prepared for drawing. */
  drawn: Frames | undefined;
  top: Load<Top>;
  total: number;
  baseTotal: number;
  /** True if the graph compares two selections. */
  diff: boolean;
  /** True if the selections have no samples. */
  isEmpty: boolean;
  busy: boolean;
  /** A mistake in the selector. */
  queryError: ApiError | undefined;
  /** True if that mistake is in the selector of the base. */
  isBaseError: boolean;
  /** Any other failure. */
  failure: ApiError | undefined;
}

/** An answer, and whether its request had a base. */
type Compared = FlameGraph & { compared: boolean };

function* withTree(graph: Compared): Sliced<{ graph: Compared; tree: Tree }> {
  return { graph, tree: yield* fromGraph(graph) };
}

/** The tree of an answer, and the same prepared for drawing. */
function useDrawn(graph: Compared | undefined, { colour, absolute }: State) {
  const tree = useSliced<{ graph: Compared; tree: Tree }>(
    () => (graph ? withTree(graph) : undefined),
    [graph],
  );
  const drawn = useSliced<Frames>(() => {
    if (!tree.value) return undefined;
    const { graph: { unit, total = 0, base_total: baseTotal = 0, compared }, tree: of } = tree.value;
    return frames(of, { unit, total, baseTotal, diff: compared, colour, absolute });
  }, [tree.value, colour, absolute]);
  return { tree, drawn };
}

export function useAnswers(state: State, selections: Selections): Answers {
  const { badTime, window, baseWindow, selection, base } = selections;
  const series = useLoad<{ series?: Series[] }>(JSON.stringify(["series", window]), (signal) => get("series", selectionParameters(window), signal));
  const types = useMemo(() => {
    const all = new Set((series.data?.series ?? []).flatMap((entry) => entry.sample_types));
    const rank = (type: string) => (TYPE_ORDER.indexOf(type) + 99) % 99;
    return [...all].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  }, [series.data]);
  const type = state.type || types[0] || "";
  // The collector would choose a type itself, perhaps another one, so requests wait until the types are known.
  const ready = state.type !== "" || series.data !== undefined;

  const lineKey = (which: Selection) => (ready ? JSON.stringify(["timeline", which, type]) : undefined);
  const loadLine = (which: Selection) => (signal: AbortSignal) =>
    get<Timeline>("timeline", { ...selectionParameters(which), type, step_ms: niceStep(which.until - which.from) }, signal);
  const line = useLoad<Timeline>(lineKey(window), loadLine(window));
  const baseLine = useLoad<Timeline>(state.compare ? lineKey(baseWindow) : undefined, loadLine(baseWindow));

  const request = { ...selectionParameters(selection), ...baseParameters(base), profile_id: state.profile, type, interpreter_frames: state.interpreters ? "true" : "", hide_error_frames: state.hideErrors ? "true" : "" };
  const key = ready ? JSON.stringify(request) : undefined;
  const wantsTable = state.show === "table" || state.show === "both" || state.show === "sandwich";
  const graph = useLoad<Compared>(key && `graph ${key}`, async (signal) => ({
    ...(await get<FlameGraph>("flamegraph", { ...request, max_nodes: MAX_NODES }, signal)),
    compared: base !== undefined,
  }));
  const top = useLoad<Top>(wantsTable && key ? `top ${key}` : undefined, (signal) => get("top", { ...request, limit: MAX_FUNCTIONS }, signal));

  const { tree, drawn } = useDrawn(graph.data, state);
  const total = graph.data?.total ?? 0;
  const baseTotal = graph.data?.base_total ?? 0;
  const queryError = [series.error, graph.error].find((error) => error?.status === 400 && !badTime);
  return {
    types,
    type,
    line: line.data,
    baseLine: baseLine.data,
    graph: graph.data,
    drawn: drawn.value,
    top,
    total,
    baseTotal,
    diff: graph.data?.compared ?? false,
    isEmpty: graph.data !== undefined && total === 0 && baseTotal === 0,
    busy: graph.loading || line.loading || series.loading || tree.busy || drawn.busy,
    queryError,
    isBaseError: queryError !== undefined && /base/.test(queryError.message) && state.compare,
    failure: badTime ? undefined : graph.error && graph.error !== queryError ? graph.error : line.error !== queryError ? line.error : undefined,
  };
}
