import t from 'tap';
import { softwareKernel } from '../../lib/kernel/index.ts';
import { kernelVersions, type ModelOptions } from '../../lib/model_options.ts';
import { sections } from './cases/index.ts';
import { needRealKernel } from './needs.ts';
import { conform, forked } from './suite.ts';
import { publish, type Tally } from './tally.ts';

const models: ModelOptions[] = [
  ...kernelVersions.map((kernel): ModelOptions => ({ arch: 'x86_64', kernel })),
  { arch: 'x86_64', kernel: '6.18', swProtected: false, tdp: false },
  { arch: 'x86_64', kernel: '7.3', swProtected: false },
  ...(['6.18', '7.1', '7.3'] as const).flatMap((kernel) =>
    [4096, 16384, 65536].map((pageSize): ModelOptions => ({ arch: 'aarch64', kernel, pageSize })),
  ),
  { arch: 'aarch64', kernel: '7.3', pkvm: true },
];

function nameOf({ arch, kernel, pageSize, swProtected, tdp, pkvm }: ModelOptions): string {
  const variant = [
    pageSize && pageSize !== 4096 && `${pageSize / 1024} KiB pages`,
    swProtected === false && 'no SW_PROTECTED',
    tdp === false && 'no TDP',
    pkvm && 'pKVM',
  ].filter(Boolean);
  return ['software', kernel, arch, variant.length > 0 && `(${variant.join(', ')})`].filter(Boolean).join(' ');
}

const tallies: Tally[] = [];
for (const model of models) {
  const name = nameOf(model);
  await t.test(name, async (t) => {
    const kernel = softwareKernel(model);
    tallies.push(await conform(t, name, kernel, forked(kernel)));
  });
}
publish('software', { tallies });

const ran = new Set(tallies.flatMap(({ agree, disagree }) => [...agree, ...disagree]));
const cases = sections.flatMap((section) => section.cases);
const never = cases.filter((each) => !ran.has(each.id) && !each.needs.some((need) => needRealKernel.includes(need)));
t.same(
  never.map((each) => each.id),
  [],
  'every case runs on some kernel the model plays, unless only a real one can',
);
t.equal(new Set(cases.map((each) => each.id)).size, cases.length, 'every case has a number of its own');
