import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { sections } from './conformance/cases/index.ts';
import { published, resultsFolder } from './conformance/tally.ts';
import { machines } from './machines/machines.ts';

// `npm run test:seeds`: what the founding threads ask for, row by row, and which tests showed it where, from what `npm test` and
// `npm run test:machines` left. A test names its row in its title: 'seed 1.3: …'; cases of the contract are listed here by their numbers.

interface Row {
  readonly id: string;
  readonly behaviour: string;
  /** Cases of the conformance suite that show it too. */
  readonly cases?: readonly string[];
}

const rows: readonly Row[] = [
  { id: '0.1', behaviour: 'a memory file is sealed for a guest', cases: ['39', '40', '88'] },
  { id: '0.2', behaviour: 'fixed size, punches by whole pages', cases: ['44', '58', '61'] },
  { id: '0.3', behaviour: 'a punch takes the page from the guest, then frees it', cases: ['74', '13.3 private punch'] },
  { id: '0.4', behaviour: 'a punch that would split a huge page may fail' },
  { id: '0.5', behaviour: 'many memslots on one file', cases: ['10.3 bind', '10.3 many slots', '140', '148'] },
  { id: '0.6', behaviour: 'one file belongs to one VM', cases: ['137', '164'] },
  { id: '0.7', behaviour: 'pages are never swapped' },
  { id: '0.8', behaviour: 'any order of closing is safe', cases: ['161', '165', '11 gmem keeps VM', '11 last close'] },
  { id: '0.9', behaviour: 'the guest’s page is found by file offset', cases: ['157', '193'] },
  { id: '0.10', behaviour: 'the VM is notified before pages go' },
  { id: '1.1', behaviour: 'shared and private parts, in a pair or in place', cases: ['193', '194', '90'] },
  { id: '1.2', behaviour: 'only shared parts can be reached', cases: ['88', '89'] },
  { id: '1.3', behaviour: 'EAGAIN while somebody has a page' },
  { id: '1.4', behaviour: 'movable and CMA pages are refused' },
  { id: '1.5', behaviour: 'private to shared always succeeds' },
  { id: '1.6', behaviour: 'contents kept, zeroed or unspecified' },
  { id: '1.7', behaviour: 'a range as wanted is a no-op' },
  { id: '1.8', behaviour: 'a punch changes no state', cases: ['12 keeps data', '180'] },
  { id: '1.9', behaviour: 'large folios split and merge' },
  { id: '1.10', behaviour: 'shared pages may migrate' },
  { id: '1.11', behaviour: 'the device ledger' },
  { id: '2.1', behaviour: 'a page has one holder', cases: ['256'] },
  { id: '2.2', behaviour: 'share: hypercall, exit, host maps', cases: ['226'] },
  { id: '2.3', behaviour: 'unshare: the guest reads the answer', cases: ['227', '15 refused'] },
  { id: '2.4', behaviour: 'unshare while mapped fails for the guest' },
  { id: '2.5', behaviour: 'a payload before the first run', cases: ['90'] },
  { id: '2.6', behaviour: 'pread and pwrite of shared parts' },
  { id: '2.7', behaviour: 'page-aligned write population' },
  { id: '2.8', behaviour: 'the special mapping' },
  { id: '2.9', behaviour: 'the grant ring' },
  { id: '2.10', behaviour: 'what each I/O scheme costs' },
  { id: '2.11', behaviour: 'several backings behind one interface' },
  { id: '3.1', behaviour: 'access only by mapping' },
  { id: '3.2', behaviour: 'out of the kernel’s direct map' },
  { id: '3.3', behaviour: 'little metadata, large contiguous chunks' },
  { id: '3.4', behaviour: 'guest memory survives the VMM' },
  { id: '3.5', behaviour: 'a torn write is noticed, the last good state used' },
  { id: '3.6', behaviour: 'frozen while it is handed over' },
  { id: '3.7', behaviour: 'the device ledger is saved and restored' },
  { id: '3.8', behaviour: 'a part of a running VM’s memory for a second VM' },
  { id: '3.9', behaviour: 'an access waits until its page has come' },
  { id: '3.10', behaviour: 'NUMA placement per range', cases: ['99', '100', '101'] },
  { id: '4.1', behaviour: 'lock or unlock is one of two flags' },
  { id: '4.2', behaviour: 'a lock names its rights' },
  { id: '4.3', behaviour: 'the slot has to be there' },
  { id: '4.4', behaviour: 'EBUSY while a vCPU runs' },
  { id: '4.5', behaviour: 'EPERM to write where nothing is for writing' },
  { id: '4.6', behaviour: 'the whole range is mapped, with these rights' },
  { id: '4.7', behaviour: 'charged to RLIMIT_MEMLOCK' },
  { id: '4.8', behaviour: 'after a lock no stage-2 fault follows' },
  { id: '4.9', behaviour: 'unlock leaves the guest mapping alone' },
  { id: '4.10', behaviour: 'rights bind the lock, not the guest' },
  { id: '4.11', behaviour: 'a locked slot stays until unlocked' },
  { id: '4.12', behaviour: 'unlock-all releases every slot' },
];

/** Where a row was shown, and how often. */
type Evidence = Map<string, number>;

function add(evidence: Evidence, where: string, count = 1): void {
  evidence.set(where, (evidence.get(where) ?? 0) + count);
}

/** Titles of tests that held, and the kernel they name: in brackets, as test/backends.ts does, or the model of a proposal. */
function fromTitles(file: string, real: string, found: ReadonlyMap<string, Evidence>): void {
  if (!existsSync(file)) return;
  for (const [, not, title = ''] of readFileSync(file, 'utf8').matchAll(/^ *(not )?ok \d+ - (.*seed \d.*)$/gm)) {
    if (not) continue;
    const kernel = /\(([^()]*(?:x86_64|aarch64|kvm))\)/.exec(title)?.[1];
    for (const [, id = ''] of title.matchAll(/seed (\d+\.\d+)/g)) {
      const evidence = found.get(id);
      if (evidence) add(evidence, kernel === 'kvm' ? real : (kernel ?? 'the model'));
    }
  }
}

function fromCases(
  family: string,
  folder: string | undefined,
  where: string,
  found: ReadonlyMap<string, Evidence>,
): void {
  for (const { kernel, agree } of published(family, folder)?.tallies ?? []) {
    const held = new Set(agree);
    for (const { id, cases = [] } of rows) {
      const count = cases.filter((each) => held.has(each)).length;
      const evidence = found.get(id);
      if (evidence && count > 0) add(evidence, where || kernel.replace(/^(linux|software) /, '$1 '), count);
    }
  }
}

const known = new Set(sections.flatMap(({ cases }) => cases.map(({ id }) => id)));
const unknown = rows.flatMap(({ cases = [] }) => cases.filter((id) => !known.has(id)));
if (unknown.length > 0) throw new Error(`there are no cases ${unknown.join(', ')}`);

const found = new Map(rows.map(({ id }): [string, Evidence] => [id, new Map()]));
fromTitles(join(resultsFolder, 'results.tap'), 'this host', found);
fromCases('linux', undefined, 'this host', found);
fromCases('software', undefined, '', found);
for (const { name } of machines) {
  const folder = join(resultsFolder, 'machines', name);
  fromTitles(join(folder, 'results.tap'), `${name} machine`, found);
  fromCases('linux', folder, `${name} machine`, found);
}

let open = 0;
for (const { id, behaviour } of rows) {
  const evidence = [...(found.get(id) ?? [])];
  const models = evidence.filter(([where]) => where.startsWith('software'));
  const places = [
    ...evidence.filter(([where]) => !where.startsWith('software')).map(([where]) => where),
    ...(models.length > 1 ? [`${models.length} software kernels`] : models.map(([where]) => where)),
  ];
  const tests = evidence.reduce((sum, [, count]) => sum + count, 0);
  if (tests === 0) open++;
  console.log(`${id.padEnd(5)} ${behaviour.padEnd(54)} ${tests > 0 ? `${tests} held: ${places.join(', ')}` : 'OPEN'}`);
}
console.log(`\n${rows.length - open} of ${rows.length} rows shown${open > 0 ? `, ${open} open: npm test first?` : ''}`);
process.exitCode = open > 0 ? 1 : 0;
