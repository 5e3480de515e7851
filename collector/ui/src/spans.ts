/** The filter by spans or traces: one text of ids with `,` between them, as the address and the API have it. */

/** Returns the parameter for the ids: those of traces have 32 hex digits. */
export const spanParameter = (ids: string): "span_id" | "trace_id" => (/^,*[\da-f]{32}(,|$)/i.test(ids) ? "trace_id" : "span_id");

/** Returns the parameters of a request for only these samples. With a mistake in the ids, it asks for all samples. */
export const spanParameters = (ids: string): { span_id?: string; trace_id?: string } => (ids === "" || mistakeInSpans(ids) !== undefined ? {} : { [spanParameter(ids)]: ids });

/** Returns the mistake in the ids and its cure. No ids are no filter. */
export function mistakeInSpans(ids: string): string | undefined {
  if (ids === "") return undefined;
  const [each, digits] = [ids.split(",").filter((id) => id !== ""), spanParameter(ids) === "trace_id" ? 32 : 16];
  if (each.length > 0 && each.every((id) => id.length === digits && /^[\da-f]+$/i.test(id))) return undefined;
  const wrong = each.length > 0 ? each.find((id) => !/^([\da-f]{16}){1,2}$/i.test(id)) : ids;
  return wrong === undefined ? "Give ids of spans or ids of traces, not both." : `“${wrong}” is no id. A span has 16 hex digits, a trace 32.`;
}
