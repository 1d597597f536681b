/** What the charts are drawn with. */

export const INK = '#1f2933';
export const FAINT = '#9aa5b1';
export const GRID = '#e4e7eb';

export interface Sheet {
  readonly width: number;
  readonly height: number;
  /** Where the headings start. */
  readonly left: number;
  readonly title: string;
  readonly subtitle: string;
}

export function svgDocument({ width, height, left, title, subtitle }: Sheet, body: readonly string[]): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(title)}" font-family="system-ui, sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#fff"/>
${text(left, 28, title, { size: 17, weight: 600 })}
${text(left, 48, subtitle, { fill: '#52606d' })}
${body.join('\n')}
</svg>
`;
}

export interface TextStyle {
  readonly anchor?: 'start' | 'middle' | 'end';
  readonly fill?: string;
  readonly size?: number;
  readonly weight?: number;
}

export function text(
  x: number,
  y: number,
  content: string,
  { anchor = 'start', fill = INK, size = 12, weight = 400 }: TextStyle = {},
): string {
  return `<text x="${fixed(x)}" y="${fixed(y)}" text-anchor="${anchor}" fill="${fill}" font-size="${size}" font-weight="${weight}">${escaped(content)}</text>`;
}

export function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}

export function fixed(value: number): string {
  return String(Math.round(value * 10) / 10);
}
