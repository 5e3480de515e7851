/** Keys of the flame graph: arrows move, Enter zooms in, Backspace zooms out, Escape resets, n and N step through matches, s shows callers and callees. */
import type { Node } from "./layout";
import type { FlameProps, FlameState } from "./useFlame";

const byColumn = (a: Node, b: Node) => a.x0 - b.x0;

/** Returns the nodes of one depth from left to right. */
const rowOf = (nodes: Node[], depth: number) => nodes.filter((node) => node.depth === depth).sort(byColumn);

function widestChild(nodes: Node[], here: Node): Node | undefined {
  const children = rowOf(nodes, here.depth + 1).filter((node) => node.parent === here);
  return children.reduce<Node | undefined>((best, node) => (!best || node.x1 - node.x0 > best.x1 - best.x0 ? node : best), undefined);
}

function neighbour(nodes: Node[], here: Node | undefined, step: number): Node | undefined {
  const row = here ? rowOf(nodes, here.depth) : [];
  return row[row.findIndex((node) => node === here) + step];
}

function nextMatch(nodes: Node[], here: Node | undefined, step: number): Node | undefined {
  const hits = nodes.filter((node) => node.highlight).sort((a, b) => a.depth - b.depth || byColumn(a, b));
  if (hits.length === 0) return undefined;
  const at = hits.findIndex((node) => node === here);
  return hits[at < 0 ? (step > 0 ? 0 : hits.length - 1) : (at + step + hits.length) % hits.length];
}

/** Returns the handler of key events on the graph. */
export function useFlameKeys({ flip, search, onClear, onFunction }: FlameProps, flame: FlameState): (event: KeyboardEvent) => void {
  return (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { nodes } = flame;
    const here = flame.here();
    const top = () => nodes.find((node) => node.depth === 0);
    let next: Node | undefined;
    switch (event.key) {
      case flip ? "ArrowUp" : "ArrowDown":
        next = here ? widestChild(nodes, here) : top();
        break;
      case flip ? "ArrowDown" : "ArrowUp":
        next = here?.parent ?? undefined;
        break;
      case "ArrowLeft":
        next = neighbour(nodes, here, -1);
        break;
      case "ArrowRight":
        next = neighbour(nodes, here, 1);
        break;
      case "Home":
        next = top();
        break;
      case "n":
        next = nextMatch(nodes, here, 1);
        break;
      case "N":
        next = nextMatch(nodes, here, -1);
        break;
      case "s":
        if (here && !here.data.special) onFunction(here.data);
        break;
      case "Enter":
      case " ":
        if (here) flame.visit(here);
        break;
      case "Backspace":
        flame.visit(flame.path[flame.path.length - 2]);
        break;
      case "Escape":
        if (flame.path.length > 1) flame.visit(flame.path[0]);
        else if (search !== "") onClear();
        else flame.pick(undefined);
        break;
      default:
        return;
    }
    event.preventDefault();
    if (next) flame.pick(next);
  };
}
