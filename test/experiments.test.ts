// What the experiments claim, held against what they measure.
import t from 'tap';
import { doubling } from '../experiments/doubling.ts';
import { type IoFindings, ioSchemes } from '../experiments/io_schemes.ts';
import { Meter } from '../experiments/meter.ts';
import { bounce } from '../experiments/schemes/released.ts';
import { AREA, AREAS } from '../experiments/schemes/scheme.ts';
import { KiB, MiB } from '../lib/index.ts';
import { realKernel } from './kvm_host.ts';

interface Doubling {
  readonly size: number;
  readonly steps: number;
  readonly runs: readonly { readonly shared: number[]; readonly private: number[] }[];
}

t.test('doubling: discarding holds every byte once, the attribute alone holds it twice', async (t) => {
  const { data, svg } = doubling.run({ backend: 'software', seed: 7 });
  const { size, steps, runs } = data as Doubling;
  const [discards, keeps] = runs.map((run) => run.shared.map((bytes, step) => bytes + (run.private[step] ?? 0)));
  t.equal(discards?.length, steps + 1);
  t.ok(
    discards?.every((bytes) => bytes <= size && bytes > 0.9 * size),
    'the sum never changes',
  );
  t.ok((keeps?.at(-1) ?? 0) > 1.8 * size);
  t.match(svg, /^<svg [\s\S]*<\/svg>\n$/);
});

t.test('seed 2.10: what a request costs, by scheme', async (t) => {
  const { data, lines, svg } = ioSchemes.run({ backend: 'software', seed: 7 });
  const { sizes, runs } = data as IoFindings;
  const find = (key: string) => {
    const run = runs.find((one) => one.key === key);
    if (!run) throw new Error(`no run ${key}`);
    return run;
  };
  const each = (key: string, claim: (cost: ReturnType<typeof find>['sizes'][number]) => boolean, message: string) =>
    t.ok(find(key).sizes.every(claim), message);
  t.equal(runs.length, 6);
  t.same([sizes[0], sizes.at(-1)], [512, MiB]);
  for (const { name, sizes: costs, real } of runs) {
    t.same(
      costs.map(({ size }) => size),
      sizes,
    );
    t.ok(!real && costs.every(({ milliseconds }) => milliseconds === null), `${name}: the model has no time`);
  }

  const copying = ['bounce', 'two-memories', 'pread'];
  for (const { key, sizes: costs } of runs) {
    const copies = copying.includes(key);
    t.ok(
      costs.every(({ size, copiedBytes }) => copiedBytes === (copies ? size : 0)),
      `${key} copies ${copies ? 'each byte once' : 'nothing'}`,
    );
  }
  for (const key of ['two-memories', 'map-each', 'special-mapping', 'pread'])
    each(key, ({ hypercalls, exits }) => hypercalls === 2 && exits === 3, `${key}: share, notify, unshare`);
  for (const key of ['bounce', 'grant-ring'])
    each(key, ({ hypercalls }) => hypercalls === 0, `${key}: asks for nothing`);

  each('bounce', ({ size, exits }) => exits === Math.ceil(size / (64 * KiB)), 'an exit each time the buffer is full');
  each('map-each', ({ calls }) => calls.mmap === 1 && calls.munmap === 1, 'mapped for each request');
  const conversions = { KVM_RUN: 3, KVM_SET_MEMORY_ATTRIBUTES2: 2 };
  for (const { calls } of find('special-mapping').sizes)
    t.same(calls, conversions, 'no call for the mapping: only the conversions themselves');
  for (const { calls } of find('pread').sizes) t.same(calls, { ...conversions, pread: 1 });
  // Each page is an entry when it is granted, and one when it is revoked; the ring has 256.
  each('grant-ring', ({ size, exits }) => exits === Math.ceil((2 * size) / MiB), 'an exit each time the ring is full');
  each('grant-ring', ({ calls }) => Object.keys(calls).join() === 'KVM_RUN', 'the ring takes no call of its own');

  for (const key of ['two-memories', 'map-each', 'special-mapping', 'grant-ring'])
    each(key, ({ flushes }) => flushes === 1, `${key}: what was mapped is taken back once, however large`);
  for (const key of ['bounce', 'pread']) each(key, ({ flushes }) => flushes === 0, `${key}: nothing is mapped`);

  t.match(lines.join('\n'), /^grant ring +counted in the model of Linux [^\n]*KVM_CAP_GRANT_RING$/m);
  t.match(svg, /^<svg [\s\S]*<\/svg>\n$/);
  t.notMatch(svg, /NaN|undefined|Infinity/);
});

const kernel = realKernel();
const onReal =
  'reason' in kernel
    ? 'the bounce buffer on real KVM'
    : 'seed 2.10: the bounce buffer on real KVM takes the same calls (kvm)';
t.test(onReal, async (t) => {
  if ('reason' in kernel) return kernel.excusable ? t.pass(kernel.reason) : t.fail(kernel.reason);
  const costs = (['kvm', 'software'] as const).map((backend) => {
    const meter = new Meter();
    const data = new Uint8Array(AREAS * AREA).map((_, index) => index % 251);
    using session = bounce.open(meter, backend, data);
    t.equal(session.real, backend === 'kvm');
    const taken = new Uint8Array(65 * KiB);
    const cost = meter.measure(() =>
      session.request({ area: 1, size: taken.length }, (bytes, offset) => taken.set(bytes, offset)),
    );
    t.same(taken, data.subarray(AREA, AREA + taken.length), 'the device has the guest’s bytes');
    return cost;
  });
  t.equal(costs[0]?.exits, 2);
  t.same(costs[0], costs[1]);
});
