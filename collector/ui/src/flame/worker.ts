/** The worker that loads flame graphs. Parsing an answer of 15 MB takes longer than a frame of the screen, so the page does not do it. */
import { ApiError, type FlameGraph, request } from "../api";
import { type Packed, buffersOf, pack } from "./packed";
import { fromGraph } from "./tree";

/** Asks for a graph, or for the end of a request that has the same id. */
export type ToWorker = { id: number; url: string } | { id: number; abort: true };

export type FromWorker = { id: number; graph: Omit<FlameGraph, "root">; packed: Packed } | { id: number; message: string; status: number };

const running = new Map<number, AbortController>();

async function load(id: number, url: string): Promise<void> {
  const abort = new AbortController();
  running.set(id, abort);
  const send = (message: FromWorker, move: ArrayBuffer[] = []) => abort.signal.aborted || postMessage(message, { transfer: move });
  try {
    const graph = await request<FlameGraph>(url, abort.signal);
    const work = fromGraph(graph);
    let step = work.next();
    while (!step.done) step = work.next();
    const packed = pack(step.value);
    const { root: _, ...head } = graph;
    send({ id, graph: head, packed }, buffersOf(packed));
  } catch (error) {
    send({ id, message: error instanceof Error ? error.message : String(error), status: error instanceof ApiError ? error.status : 0 });
  } finally {
    running.delete(id);
  }
}

addEventListener("message", ({ data }: MessageEvent<ToWorker>) => {
  if ("abort" in data) running.get(data.id)?.abort();
  else void load(data.id, data.url);
});
