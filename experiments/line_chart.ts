/** Lines over steps on logarithmic scales that may have a zero, in a grid of small panels, as an SVG document. */
import { escaped, FAINT, fixed, GRID, svgDocument, text } from './svg.ts';

export interface Series {
  readonly name: string;
  readonly color: string;
}

export interface Tick {
  readonly value: number;
  readonly label: string;
}

export interface LinePanel {
  readonly title: string;
  /** From the lowest to one that no value exceeds. */
  readonly ticks: readonly Tick[];
  /** By series, a value for each step; none where it was not measured. */
  readonly values: readonly (readonly number[])[];
}

export interface LineChart {
  readonly title: string;
  readonly subtitle: string;
  readonly series: readonly Series[];
  /** What the steps are called; an empty one has no label. */
  readonly steps: readonly string[];
  readonly panels: readonly LinePanel[];
}

const WIDTH = 960;
const COLUMNS = 3;
const [TOP, BOTTOM, LEFT, RIGHT] = [88, 20, 60, 16];
const PANEL = { width: (WIDTH - LEFT - RIGHT) / COLUMNS, height: 260, left: 0, right: 60, top: 12, bottom: 54 };
const LEGEND_ROW = 20;
/** Between lines that would lie on each other. */
const APART = 3;

export function lineChart({ title, subtitle, series, steps, panels }: LineChart): string {
  const rows = Math.ceil(panels.length / COLUMNS);
  const legendRows = Math.ceil(series.length / COLUMNS);
  const bottom = TOP + rows * PANEL.height;
  const body = panels.map((panel, index) => {
    const left = LEFT + (index % COLUMNS) * PANEL.width;
    const top = TOP + Math.floor(index / COLUMNS) * PANEL.height;
    return drawPanel(panel, { left, top, series, steps });
  });
  const legend = series.map(({ name, color }, index) => {
    const x = LEFT + (index % COLUMNS) * PANEL.width;
    const y = bottom + Math.floor(index / COLUMNS) * LEGEND_ROW;
    const line = `<line x1="${fixed(x)}" x2="${fixed(x + 18)}" y1="${y}" y2="${y}" stroke="${color}" stroke-width="3"/>`;
    return line + text(x + 25, y + 4, name);
  });
  const height = bottom + legendRows * LEGEND_ROW + BOTTOM - LEGEND_ROW / 2;
  return svgDocument({ width: WIDTH, height, left: LEFT, title, subtitle }, [...body, ...legend]);
}

interface Place {
  readonly left: number;
  readonly top: number;
  readonly series: readonly Series[];
  readonly steps: readonly string[];
}

function drawPanel({ title, ticks, values }: LinePanel, { left, top, series, steps }: Place): string {
  const width = PANEL.width - PANEL.right;
  const height = PANEL.height - PANEL.top - PANEL.bottom;
  const y = scale(ticks, top + PANEL.top, height);
  const x = (step: number): number => left + 8 + ((width - 16) * step) / Math.max(1, steps.length - 1);
  const grid = ticks.map(
    ({ value, label }) =>
      `<line x1="${fixed(left)}" x2="${fixed(left + width)}" y1="${fixed(y(value))}" y2="${fixed(y(value))}" stroke="${GRID}"/>` +
      text(left - 7, y(value) + 4, label, { anchor: 'end', fill: FAINT, size: 11 }),
  );
  const labels = steps.map((label, step) =>
    label ? text(x(step), top + PANEL.top + height + 30, label, { anchor: 'middle', fill: FAINT, size: 11 }) : '',
  );
  const offsets = apart(values);
  const lines = series.map(({ name, color }, index) => {
    const line = values[index] ?? [];
    const points = line.map((value, step) => `${fixed(x(step))},${fixed(y(value) + (offsets[index]?.[step] ?? 0))}`);
    if (points.length === 0) return '';
    return `<polyline fill="none" stroke="${color}" stroke-width="2.2" stroke-linejoin="round" points="${points.join(' ')}"><title>${escaped(name)}</title></polyline>`;
  });
  return [text(left, top, title, { weight: 600 }), ...grid, ...labels, ...lines].join('\n');
}

/** Ticks lie evenly: what is between two of them by its logarithm, what is below the first above zero as it is. */
function scale(ticks: readonly Tick[], top: number, height: number): (value: number) => number {
  const values = ticks.map((tick) => tick.value);
  return (value) => {
    const above = Math.max(
      1,
      values.findIndex((tick) => tick >= value),
    );
    const [from = 0, to = 1] = values.slice(above - 1);
    const part = from > 0 ? Math.log(value / from) / Math.log(to / from) : (value - from) / (to - from);
    return top + height * (1 - (above - 1 + part) / Math.max(1, values.length - 1));
  };
}

/** By series and step, how far from its place a line is drawn because others have the same. */
function apart(values: readonly (readonly number[])[]): number[][] {
  return values.map((line, index) =>
    line.map((value, step) => {
      const same = values.flatMap((other, at) => (other[step] === value ? [at] : []));
      return (same.indexOf(index) - (same.length - 1) / 2) * APART;
    }),
  );
}
