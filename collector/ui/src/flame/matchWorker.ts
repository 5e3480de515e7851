/** The worker that runs one regular expression on names. */
import { compile } from "./pattern";

export interface MatchRequest {
  pattern: string;
  names: string[];
}

addEventListener("message", ({ data: { pattern, names } }: MessageEvent<MatchRequest>) => {
  const expression = compile(pattern);
  postMessage(names.map((name) => expression.test(name)));
});
