/** Requests for flame graphs, which a worker answers. */
import { ApiError, type FlameGraph, type Parameters, url } from "../api";
import type { Packed } from "./packed";
import type { FromWorker, ToWorker } from "./worker";

export type LoadedGraph = Omit<FlameGraph, "root"> & { packed: Packed };

interface Waiting {
  resolve: (graph: LoadedGraph) => void;
  reject: (error: ApiError) => void;
}

const waiting = new Map<number, Waiting>();
let worker: Worker | undefined;
let lastId = 0;

function started(): Worker {
  if (worker) return worker;
  worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }: MessageEvent<FromWorker>) => {
    const caller = waiting.get(data.id);
    waiting.delete(data.id);
    if ("packed" in data) caller?.resolve({ ...data.graph, packed: data.packed });
    else caller?.reject(new ApiError(data.message, data.status));
  });
  worker.addEventListener("error", () => {
    // The next request starts another one.
    worker?.terminate();
    worker = undefined;
    for (const { reject } of waiting.values()) reject(new ApiError("The page could not read the flame graph. Reload the page.", 0));
    waiting.clear();
  });
  return worker;
}

export function loadGraph(parameters: Parameters, signal: AbortSignal): Promise<LoadedGraph> {
  const id = (lastId += 1);
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    signal.addEventListener("abort", () => {
      if (!waiting.delete(id)) return;
      worker?.postMessage({ id, abort: true } satisfies ToWorker);
      reject(new ApiError("another request replaced this one", 0));
    });
    // The addresses of a worker are relative to its own file.
    started().postMessage({ id, url: new URL(url("flamegraph", parameters), location.href).href } satisfies ToWorker);
  });
}
