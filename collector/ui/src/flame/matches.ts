/** Which names match a search or a filter. */
import { type Sliced, useSliced } from "../parts/sliced";
import type { MatchRequest } from "./matchWorker";
import { type Wanted, mistakeIn, wanted } from "./pattern";
import { NODES_OF_STEP } from "./tree";

/** Seconds after which the page gives a regular expression up. */
const MAX_SECONDS = 5;

type Named = readonly { name: string }[];

export interface Matches {
  of: Named;
  /** For each of the names, whether it matches. Empty with an error. */
  matches: boolean[];
  /** The mistake in the pattern and its cure. */
  error?: string;
}

/**
 * Finds the names that match. A regular expression can take years on a single name, and a link may contain such a one. So it
 * runs in a worker of its own, which ends with the computation.
 */
export function* matchNames(of: Named, what: Wanted): Sliced<Matches> {
  if ("test" in what) {
    const matches: boolean[] = [];
    for (const { name } of of) {
      if (matches.length % NODES_OF_STEP === 0) yield;
      matches.push(what.test(name));
    }
    return { of, matches };
  }
  const { pattern } = what;
  const mistake = mistakeIn(pattern);
  if (mistake !== undefined) return { of, matches: [], error: mistake };
  const worker = new Worker(new URL("./matchWorker.ts", import.meta.url), { type: "module" });
  try {
    let matches: boolean[] | undefined;
    yield new Promise<void>((resolve) => {
      worker.addEventListener("message", ({ data }: MessageEvent<boolean[]>) => {
        matches = data;
        resolve();
      });
      worker.addEventListener("error", () => resolve());
      worker.postMessage({ pattern, names: of.map(({ name }) => name) } satisfies MatchRequest);
      setTimeout(resolve, MAX_SECONDS * 1000);
    });
    if (matches) return { of, matches };
    return { of, matches: [], error: `The pattern takes longer than ${MAX_SECONDS} seconds. Repeat nothing inside of a repeated group, as (a+)+ does.` };
  } finally {
    worker.terminate();
  }
}

/** Returns the names that match a search; `undefined` without one, and until the first result. */
export function useSearch(of: Named, search: string): Matches | undefined {
  const { value } = useSliced<Matches>(() => (search === "" ? undefined : matchNames(of, wanted(search))), [of, search]);
  // The result of the former search stays until that of the next one, but not for other names.
  return search !== "" && value?.of === of ? value : undefined;
}
