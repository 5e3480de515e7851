/** Draws frames as SVG, a limited number in each animation frame, so that input is handled in between. */
import { points } from "../units";
import { type Frames, MOSTLY_GUESSED, changeColour, groupColour, matchColour } from "./frames";
import type { Node } from "./layout";

/** Height of a row in pixels. */
const ROW_HEIGHT = 20;
/** Frames that one animation frame draws. */
const FRAMES_OF_PAINT = 1000;
/** Minimum width of a frame with a name, in pixels. */
const MIN_LABEL_WIDTH = 35;
/** Maximum number of frames for an animated change. */
const MAX_ANIMATED_FRAMES = 400;

const SVG = "http://www.w3.org/2000/svg";

/** How to draw. */
export interface Look {
  frames: Frames;
  dark: boolean;
  /** Show differences in red and green instead of orange and blue. */
  redGreen: boolean;
  /** Draw the root at the bottom. */
  flip: boolean;
  searching: boolean;
  width: number;
}

/** The element of a frame. */
export type Group = SVGGElement & { __data__: Node };

function append(parent: Element, name: string, attributes: Record<string, string> = {}): Element {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

function fillOf({ data, highlight }: Node, { frames, dark, redGreen, searching }: Look): string {
  if (highlight && searching && !frames.diff) return matchColour(dark);
  return frames.diff ? changeColour(data.delta, dark, redGreen) : groupColour(frames.hues, data.group, dark, data.name);
}

const labelOf = ({ data }: Node, { frames }: Look) => (frames.diff && Math.abs(data.delta) >= 0.001 ? `${data.name} (${points(data.delta)})` : data.name);

/** The SVG in one element, and the work that is still to do on it. */
export class Drawing {
  private readonly svg: Element;
  private readonly defs: Element;
  private groups = new Map<string, Group>();
  private hatches = new Map<string, string>();
  private pending = 0;

  /** `id` distinguishes the patterns of several drawings on one page. */
  constructor(
    private readonly host: HTMLElement,
    private readonly id: string,
  ) {
    this.svg = append(host, "svg", { class: "frames", "aria-hidden": "true" });
    this.defs = append(this.svg, "defs");
  }

  /** Draws these frames, whose order is that of their rows. The first part is drawn before this returns. */
  show(nodes: Node[], look: Look, current: string): void {
    cancelAnimationFrame(this.pending);
    const rows = 1 + nodes.reduce((most, { depth }) => Math.max(most, depth), 0);
    this.svg.setAttribute("width", String(look.width));
    this.svg.setAttribute("height", String(rows * ROW_HEIGHT));
    this.svg.classList.toggle("animated", Math.max(nodes.length, this.groups.size) <= MAX_ANIMATED_FRAMES);
    this.defs.replaceChildren();
    this.hatches = new Map();
    const former = this.groups;
    this.groups = new Map();
    for (const node of nodes) {
      const group = former.get(node.data.key);
      if (!group) continue;
      former.delete(node.data.key);
      this.groups.set(node.data.key, group);
    }
    for (const group of former.values()) group.remove();
    let at = 0;
    const paint = () => {
      const until = Math.min(nodes.length, at + FRAMES_OF_PAINT);
      for (; at < until; at += 1) this.place(nodes[at] as Node, look, rows);
      this.host.setAttribute("aria-busy", String(at < nodes.length));
      if (at < nodes.length) this.pending = requestAnimationFrame(paint);
      else this.mark(current);
    };
    paint();
  }

  /** Marks the current frame. */
  mark(key: string): void {
    this.svg.querySelector("g.frame.current")?.classList.remove("current");
    const group = this.groups.get(key);
    if (!group) return;
    group.classList.add("current");
    // The last child is painted on top, so that neighbours do not cover the outline of the current frame.
    if (this.svg.lastElementChild !== group) this.svg.append(group);
  }

  scrollTo(key: string): void {
    this.groups.get(key)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  destroy(): void {
    cancelAnimationFrame(this.pending);
    this.svg.remove();
  }

  /** Draws one frame, in its former element if it has one. */
  private place(node: Node, look: Look, rows: number): void {
    const { data } = node;
    let group = this.groups.get(data.key);
    if (!group) {
      group = append(this.svg, "g") as Group;
      append(group, "rect", { height: String(ROW_HEIGHT) });
      this.groups.set(data.key, group);
    }
    group.__data__ = node;
    const left = node.x0 * look.width;
    const wide = (node.x1 - node.x0) * look.width;
    group.style.transform = `translate(${left.toFixed(2)}px, ${(look.flip ? rows - 1 - node.depth : node.depth) * ROW_HEIGHT}px)`;
    const rect = group.firstElementChild as SVGRectElement;
    rect.setAttribute("width", wide.toFixed(2));
    const fill = fillOf(node, look);
    rect.setAttribute("fill", fill);
    // The whole graph is no frame that could be wrong.
    const guessed = node.depth > 0 ? data.guessed : 0;
    rect.style.fill = guessed >= MOSTLY_GUESSED ? this.hatched(fill) : "";
    const classes = ["frame"];
    const mark = (name: string, on: boolean) => on && classes.push(name);
    mark("special", data.special && node.depth > 0);
    mark("inlined", data.inlined);
    mark("kernel", data.kernel);
    mark("guessed", guessed >= MOSTLY_GUESSED);
    mark("partly-guessed", guessed > 0 && guessed < MOSTLY_GUESSED);
    mark("match", look.searching && node.highlight);
    mark("miss", look.searching && !node.highlight);
    mark("more", look.frames.diff && data.delta >= 0.001);
    mark("less", look.frames.diff && data.delta <= -0.001);
    mark("fade", node.fade);
    group.setAttribute("class", classes.join(" "));
    this.label(group, node, look, wide);
  }

  private label(group: Group, node: Node, look: Look, wide: number): void {
    let box = group.childNodes[1] as Element | undefined;
    if (wide < MIN_LABEL_WIDTH) {
      box?.remove();
      return;
    }
    if (!box) {
      box = append(group, "foreignObject", { height: String(ROW_HEIGHT) });
      box.append(Object.assign(document.createElement("div"), { className: "frame-label" }));
    }
    box.setAttribute("width", wide.toFixed(2));
    const text = labelOf(node, look);
    const div = box.firstElementChild as HTMLElement;
    if (div.textContent !== text) div.textContent = text;
  }

  /** Returns a hatched fill of a colour. */
  private hatched(colour: string): string {
    let id = this.hatches.get(colour);
    if (id === undefined) {
      id = `${this.id}hatch-${this.hatches.size}`;
      this.hatches.set(colour, id);
      const pattern = append(this.defs, "pattern", { id, width: "7", height: "7", patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
      append(pattern, "path", { d: "M0 0H7V7H0Z", fill: colour });
      append(pattern, "path", { d: "M1 0V7", class: "hatch" });
    }
    return `url(#${id})`;
  }
}
