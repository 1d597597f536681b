import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { Problem } from './command.ts';
import { cachedKernel } from './kernel.ts';
import { type Machine, machines } from './machines.ts';
import { missingPackages, requirePackages } from './packages.ts';
import { runInMachine } from './run.ts';
import { runSuite } from './suite.ts';

const help = `npm run test:machines -- [${machines.map(({ name }) => name).join('|')} …] [options]

Runs the tests on Linux kernels of their own, under QEMU: ${machines.flatMap(({ name, always }) => (always ? [name] : [])).join(', ')} unless others are named.

  --list            the machines, and what is cached or missing for them
  --files TEXT …    only test files whose path contains one of these
  --kernel PATH     another bzImage or Image than Debian's newest
  --keep            then a shell in the machine, on this terminal
  --run FILE ARG …  not the tests but this script, with all that follows as its arguments; the status is the script's`;

interface Options {
  machines: Machine[];
  list: boolean;
  keep: boolean;
  kernel?: string;
  files: string[];
  run: string[];
}

function parse(args: readonly string[]): Options {
  const options: Options = { machines: [], list: false, keep: false, files: [], run: [] };
  const rest = [...args];
  const value = (name: string): string => {
    const found = rest.shift();
    if (found === undefined) throw new Problem(`${name} needs a value\n\n${help}`);
    return found;
  };
  for (let arg = rest.shift(); arg !== undefined; arg = rest.shift()) {
    const machine = machines.find(({ name }) => name === arg);
    if (machine) options.machines.push(machine);
    else if (arg === '--list') options.list = true;
    else if (arg === '--keep') options.keep = true;
    else if (arg === '--kernel') options.kernel = resolve(value(arg));
    else if (arg === '--files') options.files.push(value(arg), ...rest.splice(0));
    else if (arg === '--run') options.run.push(value(arg), ...rest.splice(0));
    else throw new Problem(`${arg === '--help' ? '' : `there is no ${arg}\n\n`}${help}`);
  }
  if (options.machines.length === 0) options.machines = machines.filter(({ always }) => always);
  const isOne = options.machines.length === 1;
  if (!isOne && (options.keep || options.kernel || options.run.length > 0))
    throw new Problem('--keep, --kernel and --run are for one machine: name it');
  if (options.kernel && !existsSync(options.kernel)) throw new Problem(`no kernel ${options.kernel}`);
  return options;
}

function list(): void {
  for (const machine of machines) {
    const kernel = cachedKernel(machine);
    const missing = missingPackages(machine, !kernel);
    console.log(`${machine.name}: ${machine.what}${machine.always ? '' : ' (runs only when named)'}`);
    console.log(`  kernel: ${kernel ?? 'not built yet'}`);
    console.log(`  packages: ${missing.length > 0 ? `missing ${missing.join(' ')}` : 'all there'}`);
  }
}

async function main(): Promise<number> {
  const options = parse(process.argv.slice(2));
  if (options.list) {
    list();
    return 0;
  }
  requirePackages(
    options.machines.flatMap((machine) => missingPackages(machine, !options.kernel && !cachedKernel(machine))),
  );
  const { keep, kernel, run } = options;
  const how = { keep, ...(kernel && { kernel }) };
  if (run.length > 0) {
    const { status, problem } = await runInMachine(options.machines[0] as Machine, run, { ...how, deadline: 0 });
    if (problem) console.error(`the machine failed: ${problem}`);
    return status ?? 1;
  }
  // All of it last: the end of a long log is what is read, and kept.
  const problems: string[] = [];
  for (const machine of options.machines) problems.push(...(await runSuite(machine, options.files, how)));
  for (const problem of problems) console.log(`\n${problem}`);
  return problems.length > 0 ? 1 : 0;
}

try {
  process.exitCode = await main();
} catch (error) {
  if (!(error instanceof Problem)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}
