/** Types of the part of d3-flame-graph that the page uses. The package has none. */
declare module "d3-flame-graph" {
  export interface ChartNode<D> {
    id: number;
    data: D & { hide?: boolean; fade?: boolean };
    depth: number;
    parent: ChartNode<D> | null;
    children?: ChartNode<D>[];
    x0: number;
    x1: number;
    highlight?: boolean;
  }

  export interface Tip<D> {
    (): void;
    show(event: MouseEvent, node: ChartNode<D>): void;
    hide(): void;
    destroy(): void;
  }

  export interface Chart<D> {
    (selection: unknown): void;
    width(width: number): this;
    cellHeight(height: number): this;
    minFrameSize(width: number): this;
    transitionDuration(ms: number): this;
    inverted(rootOnTop: boolean): this;
    sort(order: boolean | ((a: ChartNode<D>, b: ChartNode<D>) => number)): this;
    selfValue(values: boolean): this;
    resetHeightOnZoom(reset: boolean): this;
    title(text: string): this;
    tooltip(tip: Tip<D>): this;
    getName(name: (node: ChartNode<D>) => string): this;
    getValue(value: (data: D) => number): this;
    setColorMapper(colour: (node: ChartNode<D>, original: string) => string): this;
    setSearchMatch(match: (node: ChartNode<D>, term: string) => boolean): this;
    setSearchHandler(handler: (found: ChartNode<D>[], sum: number, total: number) => void): this;
    setDetailsHandler(handler: (text: string | null) => void): this;
    onClick(handler: (node: ChartNode<D>) => void): this;
    search(term: string): void;
    clear(): void;
    zoomTo(node: ChartNode<D>): void;
    resetZoom(): void;
    update(data?: D): void;
    destroy(): void;
  }

  export default function flamegraph<D>(): Chart<D>;
}

declare module "d3-selection" {
  export function select(element: Element): { datum<T>(data: T): unknown };
}
