@echo off
rem First run: sets everything up under installer_files\, then starts Switchyard. Later runs: starts it.
rem start_windows.bat [subcommand] [flags]   subcommands: serve doctor convert download quantize install update rollback run test
setlocal
cd /d "%~dp0"
set PYTHONPATH=
set PYTHONHOME=
set PYTHONUTF8=1
chcp 65001 >nul

if defined SWITCHYARD_PYTHON (
    call :try "%SWITCHYARD_PYTHON%" && goto run
)
for %%V in (3.13 3.12 3.11 3.10 3.14) do (
    call :try py -%%V && goto run
)
call :try python && goto run
call :try python3 && goto run
echo Switchyard needs Python 3.10 or newer: install it from python.org (tick "Add python.exe to PATH") and run this again. 1>&2
pause
exit /b 1

:try
%* -c "import sys; sys.exit(sys.version_info < (3, 10))" >nul 2>nul
if errorlevel 1 exit /b 1
set SWITCHYARD_CHOSEN=%*
exit /b 0

:run
%SWITCHYARD_CHOSEN% one_click.py %*
set SWITCHYARD_STATUS=%errorlevel%
if not "%SWITCHYARD_STATUS%"=="0" if "%~1"=="" pause
exit /b %SWITCHYARD_STATUS%
