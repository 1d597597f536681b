import type { DemoEvent, Part, Scene } from './demo.ts';
import { drawLegend, drawMap, sideColours } from './memory_map.ts';
import { amount, COLUMNS, type Paint, wrap } from './text.ts';
import type { Step } from './tour.ts';

type Write = (text: string) => void;

/** Prints each step as it is done. */
export async function demoAsText(events: AsyncIterable<DemoEvent>, paint: Paint, write: Write): Promise<void> {
  const line = (text = ''): void => write(`${text}\n`);
  const held: number[] = [];
  let before: string[] = [];
  const freed: number[] = [];
  let [memory, number] = [0, 0];
  for await (const event of events) {
    if (event.kind === 'part') {
      for (const text of drawPart(event.part, paint)) line(text);
      line();
      continue;
    }
    const { scene } = event;
    const memoryLines = drawMemory(scene, paint);
    const same = memoryLines.join() === before.join();
    const legend = number === 0 ? ['', ...drawLegend(scene.map, paint)] : [];
    const shown = same ? [paint('dim', `${'memory'.padStart(11)}   as before`)] : memoryLines;
    for (const text of [...drawStep(scene, ++number, paint), ...shown, ...legend, '']) line(text);
    before = memoryLines;
    held.push(scene.held.shared + scene.held.private);
    freed.push(scene.numbers.freedBytes ?? 0);
    memory = Math.max(memory, scene.numbers.memory ?? 0);
  }
  const given = freed.reduce((sum, bytes) => sum + bytes, 0);
  const summary = `In short: a guest with ${amount(memory)} of memory never held more than ${amount(Math.max(...held))}; ${amount(given)} went back to the host on the way.`;
  for (const text of wrap(summary)) line(paint('bold', text));
  line(paint('dim', 'More: guest-memfd probe · guest-memfd demo --help · examples/'));
}

/** Everything as one document. Bytes and addresses are numbers. */
export async function demoAsJson(events: AsyncIterable<DemoEvent>, write: Write): Promise<void> {
  const parts: (Part & { steps: unknown[] })[] = [];
  for await (const event of events) {
    if (event.kind === 'part') parts.push({ ...event.part, steps: [] });
    else {
      const { map: _, ...scene } = event.scene;
      const { backend, kernel, vmType } = event.part;
      parts.at(-1)?.steps.push({ ...scene, backend, kernel, vmType });
    }
  }
  write(`${JSON.stringify({ parts }, null, 2)}\n`);
}

function drawPart({ backend, kernel, arch, vmType, notes }: Part, paint: Paint): string[] {
  const name = backend === 'kvm' ? `KVM of this host, Linux ${kernel}` : `Software kernel, playing Linux ${kernel}`;
  const title = `━━ ${name} on ${arch} · VM type ${vmType} `;
  return [
    paint(['bold', backend === 'kvm' ? 'cyan' : 'yellow'], title.padEnd(COLUMNS, '━')),
    ...notes.flatMap((note) => wrap(note, '   ')),
  ];
}

function drawStep({ title, calls, outcome, refusal }: Step, number: number, paint: Paint): string[] {
  return [
    paint('bold', `${String(number).padStart(2)}  ${title}`),
    ...calls.flatMap((call) => wrap(call, '      ', '    ')).map((call) => paint('dim', call)),
    ...outcome.flatMap((text) => wrap(text, '      ', '    → ')),
    ...(refusal ? wrap(refusal.message, '      ', '    ✗ ').map((text) => paint('yellow', text)) : []),
  ];
}

/** The bars, and the bytes really held. */
function drawMemory({ map, held }: Scene, paint: Paint): string[] {
  const bytes = (side: 'shared' | 'private'): string =>
    paint(held[side] > 0 ? sideColours[side] : 'dim', `${amount(held[side])} ${side}`);
  return [...drawMap(map, paint), `${'held'.padStart(11)}   ${bytes('shared')}, ${bytes('private')}`];
}
