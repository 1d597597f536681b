import t from 'tap';
import { backendNames } from './backends.ts';
import { child, concurrently } from './lifecycle/child_process.ts';
import { some, times } from './pace.ts';

// The ends of programs: at every stage, in every way, with everything open, or with nobody left who could close.

t.test('a program may end at any stage, in any way', async (t) => {
  const stages = [
    'kvm',
    'vm',
    'guest_memfd',
    'window',
    'slot',
    'view',
    'pin',
    'conversion',
    'conversion at work',
    'closed',
    'boundary calls',
  ];
  const endings: Record<string, { code: number | null; signal?: string }> = {
    return: { code: 0 },
    exit: { code: 7 },
    throw: { code: 1 },
    reject: { code: 1 },
    SIGTERM: { code: null, signal: 'SIGTERM' },
    'close in exit': { code: 7 },
  };
  const everywhere = new Set(['exit', 'throw', 'SIGTERM']);
  const inTheMiddle = new Set(['conversion at work', 'boundary calls', 'view']);
  const cases = backendNames.flatMap((backend) =>
    stages.flatMap((stage) =>
      Object.entries(endings)
        // The software kernel is JavaScript, and ends with it: it is enough to see it in the middle of things.
        .filter(([ending]) => inTheMiddle.has(stage) || (backend === 'kvm' && everywhere.has(ending)))
        .map(([ending, expected]) => ({ backend, stage, ending, expected })),
    ),
  );
  await concurrently(some(cases), async ({ backend, stage, ending, expected }) => {
    const { code, signal, errors } = await child('stages', backend, stage, ending);
    t.same({ code, signal }, { signal: null, ...expected }, `${backend}, ${stage}, ${ending}: ${errors.slice(0, 500)}`);
    if (ending !== 'throw' && ending !== 'reject') t.equal(errors, '', 'nothing is said');
  });
});

t.test('what nobody closes is collected, with a warning each', async (t) => {
  for (const backend of backendNames) {
    const { code, signal, output } = await child('collected', backend);
    t.same({ code, signal }, { code: 0, signal: null });
    const { report, kept } = JSON.parse(output) as {
      report: Record<string, { warnings: string[]; files: string[]; mappings: number }>;
      kept: { alive: boolean[]; warned: number; later: number; files: string[] };
    };
    const objects: Record<string, string[]> = {
      kvm: ['KVM'],
      vm: ['KVM', 'VM'],
      'host memory': ['KVM', 'host memory'],
      'host memory with a view': ['KVM', 'host memory'],
      guest_memfd: ['KVM', 'VM', 'guest_memfd'],
      'guest_memfd with a view': ['KVM', 'VM', 'guest_memfd'],
      'slot and view': ['KVM', 'VM', 'guest_memfd', 'host memory'],
      conversion: ['KVM', 'VM'],
      closed: [],
    };
    t.same(Object.keys(report), Object.keys(objects));
    for (const [program, expected] of Object.entries(objects)) {
      const { warnings, files, mappings } = report[program] ?? { warnings: [], files: [], mappings: -1 };
      t.same(
        warnings.map((text) => text.replace(/ (\(.*\) )?was garbage-collected.*/, '')).sort(),
        expected,
        `${backend}: ${program}`,
      );
      t.same(files, [], `${backend}: ${program}: no file is left`);
      t.equal(mappings, 0, `${backend}: ${program}: no mapping is left`);
    }
    t.same(
      kept,
      { alive: [true, true, true], warned: 0, later: 4, files: [] },
      `${backend}: views keep what they show`,
    );
  }
});

t.test('windows cloned, posted and transferred', async (t) => {
  for (const backend of backendNames) {
    const { code, signal, output, errors } = await child('transfers', backend);
    t.same({ code, signal }, { code: 0, signal: null }, errors.slice(0, 1000));
    for (const [what, result] of Object.entries(JSON.parse(output || '{}') as Record<string, unknown>)) {
      if (what.endsWith(', again')) t.equal(result, true, `${backend}: ${what}`);
      else if (what.endsWith(', after close')) t.fail(`${backend}: ${what}: ${result}`);
      else if (/clone$|post$/.test(what) && !what.endsWith('transfer by clone'))
        t.equal(result, 5, `${backend}: ${what}`);
    }
  }
});

t.test('a VM on several threads', async (t) => {
  if (!backendNames.includes('kvm')) return;
  const endings: Record<string, number> = { terminate: 0, close: 0, owner: 0, exit: 7, throw: 1 };
  await concurrently(some(Object.entries(endings), 2), async ([ending, expected]) => {
    const { code, signal, output, errors } = await child('shared_vm', ending, String(times(10)));
    t.same({ code, signal }, { code: expected, signal: null }, `${ending}: ${errors.slice(0, 1000)}`);
    if (expected !== 0) return;
    const { before, after, longest } = JSON.parse(output);
    t.same(after, before, `${ending}: nothing is left`);
    t.ok(longest < 20_000, `${ending}: no run is waited for, which would take a minute: ${longest} ms`);
  });
});
