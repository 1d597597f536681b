/** Areas on top of each other over steps, one panel beside the other, as an SVG document. */
import { escaped, FAINT, fixed, GRID, INK, svgDocument, text } from './svg.ts';

export interface Layer {
  readonly name: string;
  readonly color: string;
}

export interface Panel {
  readonly title: string;
  /** By layer, a value for each step. */
  readonly values: readonly (readonly number[])[];
}

export interface StackedChart {
  readonly title: string;
  readonly subtitle: string;
  readonly unit: string;
  readonly xLabel: string;
  readonly layers: readonly Layer[];
  readonly panels: readonly Panel[];
  /** A line across all panels. */
  readonly limit: { readonly value: number; readonly label: string };
}

const WIDTH = 960;
const HEIGHT = 400;
const TOP = 92;
const BOTTOM = 52;
const LEFT = 56;
const GAP = 28;
const RIGHT = 16;

export function stackedChart({ title, subtitle, unit, xLabel, layers, panels, limit }: StackedChart): string {
  const totals = panels.flatMap(({ values }) => (values[0] ?? []).map((_, step) => sum(values, step)));
  const top = niceCeiling(Math.max(limit.value, ...totals));
  const height = HEIGHT - TOP - BOTTOM;
  const width = (WIDTH - LEFT - RIGHT - GAP * (panels.length - 1)) / panels.length;
  const y = (value: number): number => TOP + height * (1 - value / top);
  const ticks = Array.from({ length: 5 }, (_, index) => (top * index) / 4);

  const body = panels.map(({ title, values }, index) => {
    const left = LEFT + index * (width + GAP);
    const steps = values[0]?.length ?? 0;
    const x = (step: number): number => left + (width * step) / Math.max(1, steps - 1);
    const edge = (layer: number, step: number): number => y(sum(values.slice(0, layer + 1), step));
    const areas = layers.map(({ name, color }, layer) => {
      const upper = Array.from({ length: steps }, (_, step) => `${fixed(x(step))},${fixed(edge(layer, step))}`);
      const lower = Array.from({ length: steps }, (_, step) => `${fixed(x(step))},${fixed(edge(layer - 1, step))}`);
      return `<polygon fill="${color}" points="${[...upper, ...lower.reverse()].join(' ')}"><title>${escaped(name)}</title></polygon>`;
    });
    return [
      text(left, TOP - 12, title, { weight: 600 }),
      ...ticks.map(
        (tick) => `<line x1="${left}" x2="${left + width}" y1="${y(tick)}" y2="${y(tick)}" stroke="${GRID}"/>`,
      ),
      ...areas,
      `<line x1="${left}" x2="${left + width}" y1="${y(limit.value)}" y2="${y(limit.value)}" stroke="${INK}" stroke-dasharray="5 4"/>`,
      ...(index === 0
        ? ticks.map((tick) => text(LEFT - 8, y(tick) + 4, String(tick), { anchor: 'end', fill: FAINT }))
        : []),
      text(left, HEIGHT - BOTTOM + 20, '0', { fill: FAINT }),
      text(left + width, HEIGHT - BOTTOM + 20, String(steps - 1), { anchor: 'end', fill: FAINT }),
      text(left + width / 2, HEIGHT - BOTTOM + 20, xLabel, { anchor: 'middle', fill: FAINT }),
    ].join('\n');
  });

  let at = LEFT;
  const legend = [
    ...layers.map(({ name, color }) => ({ name, mark: `fill="${color}"` })),
    { name: limit.label, mark: '' },
  ].map(({ name, mark }) => {
    const left = at;
    at += 34 + name.length * 7;
    const sign = mark
      ? `<rect x="${left}" y="${HEIGHT - 22}" width="12" height="12" ${mark}/>`
      : `<line x1="${left}" x2="${left + 14}" y1="${HEIGHT - 16}" y2="${HEIGHT - 16}" stroke="${INK}" stroke-dasharray="5 4"/>`;
    return sign + text(left + 20, HEIGHT - 12, name);
  });

  return svgDocument({ width: WIDTH, height: HEIGHT, left: LEFT, title, subtitle }, [
    text(LEFT - 8, TOP - 12, unit, { anchor: 'end', fill: FAINT }),
    ...body,
    ...legend,
  ]);
}

function sum(values: readonly (readonly number[])[], step: number): number {
  return values.reduce((total, layer) => total + (layer[step] ?? 0), 0);
}

/** The next number that four lines divide into round steps. */
function niceCeiling(value: number): number {
  const unit = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  const found = [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10].find((factor) => factor * unit >= value) ?? 10;
  return found * unit;
}
